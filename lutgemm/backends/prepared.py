"""Kernel layouts of weights, kept for as long as the tensors they were made from.

A kernel looks for its layout when it runs, by the tensors it was given, so that eager calls, compiled and exported
graphs and training share one copy. An entry is of use while every tensor is the same object, at the same address, with
the same version: torch counts a version up at every change in place. A change through `.data` is not counted
(`QuantizedWeight.repack` tells of one), and tensors made in inference mode have no count, so their layouts are made in
every call. An entry goes when one of its tensors does, so tensors that are made in every call, such as those of
`weight.at(2)`, are prepared in every call: what is to be used again has to be held.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from torch import Tensor

Tensors = tuple[Tensor | None, ...]
"""Those that a layout is made from; the first two, codes and scales (codebooks), are always there."""

Parameters = tuple[Any, ...]
"""What else a layout depends on, hashable, with which of the tensors are there."""

State = tuple[tuple[int, int, int, int], ...]
"""(place, id, version, address) of each of `Tensors` that is there."""

Place = tuple[int, Parameters]
"""Where entries are looked for: the id of the second tensor, and the parameters. Layers made from one record share its
codes but have scales (codebooks) of their own, so that hardly ever more than one entry lies in a place."""


class Entry:
    """The layouts of some tensors by their kind, and the state of the tensors when they were made.

    Of an entry that was dropped `layouts` is empty: whoever holds one keeps no layout alive.
    """

    __slots__ = ("layouts", "own", "state", "watched")

    def __init__(self, place: Place, tensors: Tensors, state: State) -> None:
        self.state = state
        self.own = own = _ids(state)
        self.layouts: dict[str, Tensor] = {}

        def drop(_: object, take_out: Callable[[Place, Ids], None] = _take_out) -> None:
            take_out(place, own)

        self.watched = [weakref.ref(tensor, drop) for tensor in tensors if tensor is not None]


Ids = tuple[tuple[int, int], ...]
"""(place, id) of each of `Tensors` that is there."""


def _ids(state: State) -> Ids:
    return tuple((place, own) for place, own, _, _ in state)


_entries: dict[Place, list[Entry]] = {}
"""An id in a state is never that of a later tensor: the entry goes with the first of its tensors to go."""


def _take_out(place: Place, own: Ids, entries: dict[Place, list[Entry]] = _entries) -> None:
    """Drop the entry of these tensors. A default keeps the table within reach when the interpreter shuts down.

    Lists are changed in place, one entry at a time: what another thread puts in meanwhile may be lost, and is then made
    again, but nothing that went comes back.
    """
    there = entries.get(place, [])
    for entry in [entry for entry in there if entry.own == own]:
        with suppress(ValueError):
            there.remove(entry)
        entry.layouts.clear()
    if not there:
        entries.pop(place, None)


def entry_of(tensors: Tensors, parameters: Parameters) -> Entry | None:
    """What was kept of these tensors as they are now. Less than 1 us."""
    for entry in _entries.get((id(tensors[1]), parameters), ()):
        for place, own, version, address in entry.state:
            tensor: Any = tensors[place]
            if id(tensor) != own or tensor._version != version or tensor.data_ptr() != address:
                break
        else:
            return entry
    return None


def find(tensors: Tensors, parameters: Parameters, kind: str) -> Tensor | None:
    """The layout of that kind, if one was kept of these tensors as they are now."""
    entry = entry_of(tensors, parameters)
    return None if entry is None else entry.layouts.get(kind)


class Ready:
    """A call that has been made, ready to be made again: an operator, the layout it reads and its last arguments.

    It holds none of the record's tensors, and no layout that `prepared` has dropped.
    """

    __slots__ = ("floats", "integers", "kind", "layouts", "operator", "tail")

    def __init__(
        self,
        operator: Callable[..., Any],
        names: Sequence[str],
        tensors: Tensors,
        entry: Entry,
        kind: str,
        tail: tuple[Any, ...],
    ) -> None:
        """names: in the record, of `tensors`, which the entry was made from."""
        self.operator = operator
        floats: list[tuple[str, int, int, int]] = []
        integers: list[tuple[str, int, int, int]] = []
        for place, own, version, address in entry.state:
            tensor = tensors[place]
            held = floats if tensor is not None and tensor.is_floating_point() else integers
            held.append((names[place], own, version, address))
        self.floats, self.integers = tuple(floats), tuple(integers)
        self.layouts = entry.layouts
        self.kind = kind
        self.tail = tail

    def layout(self, floats: Mapping[str, Tensor | None], integers: Mapping[str, Tensor | None]) -> Tensor | None:
        """The layout, if these hold the tensors that it was made from, unchanged. In every call: 0.6 us.

        floats, integers: a record's tensors, twice, or the parameters and the buffers of a layer.
        """
        for name, own, version, address in self.floats:
            tensor: Any = floats.get(name)
            if id(tensor) != own or tensor._version != version or tensor.data_ptr() != address:
                return None
        for name, own, version, address in self.integers:
            tensor = integers.get(name)
            if id(tensor) != own or tensor._version != version or tensor.data_ptr() != address:
                return None
        return self.layouts.get(self.kind)


def state_of(tensors: Tensors) -> State | None:
    """What `keep` needs to know from before the layout is made; None when torch cannot tell changes."""
    there = [(place, tensor) for place, tensor in enumerate(tensors) if tensor is not None]
    if any([tensor.is_inference() for _, tensor in there]):  # noqa: C419 (a list is faster)
        _warn_of_inference_tensors()
        return None
    return tuple([(place, id(t), t._version, t.data_ptr()) for place, t in there])


def keep(tensors: Tensors, parameters: Parameters, state: State | None, kind: str, layout: Tensor) -> None:
    """Keep `layout` beside `tensors`, whose `state_of` was `state` before it was made."""
    if state is None:
        return
    place = (id(tensors[1]), parameters)
    for entry in _entries.get(place, ()):
        if entry.state == state:
            entry.layouts[kind] = layout
            return
    _take_out(place, _ids(state))
    entry = Entry(place, tensors, state)
    entry.layouts[kind] = layout
    _entries.setdefault(place, []).append(entry)


def _made_from(tensors: Iterable[Tensor]) -> list[tuple[Place, Entry]]:
    """The entries with any of these tensors, and their places."""
    wanted = set(map(id, tensors))
    found = [(place, entry) for place, entries in list(_entries.items()) for entry in entries]
    return [(place, entry) for place, entry in found if any(own in wanted for _, own in entry.own)]


def forget(*tensors: Tensor) -> None:
    """Drop all that was made from any of these, alone or with others. Until the next call nothing refers to them."""
    for place, entry in _made_from(tensors):
        _take_out(place, entry.own)


def kept(codes: Tensor) -> dict[str, Tensor]:
    """What is kept that was made from the weight of these codes, by kind; it may be out of date until the next call."""
    return {kind: layout for _, entry in _made_from([codes]) for kind, layout in entry.layouts.items()}


@cache
def _warn_of_inference_tensors() -> None:
    warnings.warn(
        "a quantized weight made under torch.inference_mode() is prepared again in every call, because torch does not "
        "count changes of its tensors; make or load it outside of inference mode, or hold it in a lutgemm layer",
        RuntimeWarning,
        stacklevel=2,
    )
