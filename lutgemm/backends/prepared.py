"""Kernel layouts of weights, kept for as long as the tensors they were made from.

A kernel looks for its layout when it runs, by the tensors it was given, so that eager calls, compiled and exported
graphs and training share one copy. An entry is found by the identity of the first tensor and is of use while every
tensor is the same object, at the same address, with the same version: torch counts a version up at every change in
place. A change through `.data` is not counted (`QuantizedWeight.repack` tells of one), and tensors made in inference
mode have no count, so their layouts are made in every call. An entry goes when one of its tensors does.
"""

from __future__ import annotations

import warnings
import weakref
from functools import cache
from typing import Any

from torch import Tensor

Tensors = tuple[Tensor | None, ...]
"""Those that a layout is made from; the first, the codes of a weight, is always there."""

Parameters = tuple[Any, ...]
"""What else a layout depends on, hashable, with which of the tensors are there."""

State = tuple[tuple[int, int, int, int], ...]
"""(place, id, version, address) of each of `Tensors` that is there."""


class _Entry:
    """The layouts of some tensors by their kind, and the state of the tensors when they were made."""

    __slots__ = ("layouts", "state", "watched")

    def __init__(self, place: tuple[int, Parameters], tensors: Tensors, state: State) -> None:
        self.state = state
        self.layouts: dict[str, Tensor] = {}

        def drop(_: object, entries: dict[tuple[int, Parameters], _Entry] = _entries) -> None:
            entries.pop(place, None)

        self.watched = [weakref.ref(tensor, drop) for tensor in tensors if tensor is not None]


_entries: dict[tuple[int, Parameters], _Entry] = {}
"""By the id of the first tensor, and the parameters. An id in a state is never that of a later tensor: the entry goes
with the first of its tensors to go."""


def find(tensors: Tensors, parameters: Parameters, kind: str) -> Tensor | None:
    """The layout of that kind, if one was kept of these tensors as they are now. In every call: some 0.4 us."""
    entry = _entries.get((id(tensors[0]), parameters))
    if entry is None:
        return None
    for place, own, version, address in entry.state:
        tensor: Any = tensors[place]
        if id(tensor) != own or tensor._version != version or tensor.data_ptr() != address:
            return None
    return entry.layouts.get(kind)


def state_of(tensors: Tensors) -> State | None:
    """What `keep` needs to know from before the layout is made; None when torch cannot tell changes."""
    there = [(place, tensor) for place, tensor in enumerate(tensors) if tensor is not None]
    if any(tensor.is_inference() for _, tensor in there):
        _warn_of_inference_tensors()
        return None
    return tuple((place, id(t), t._version, t.data_ptr()) for place, t in there)


def keep(tensors: Tensors, parameters: Parameters, state: State | None, kind: str, layout: Tensor) -> None:
    """Keep `layout` beside `tensors`, whose `state_of` was `state` before it was made."""
    if state is None:
        return
    place = (id(tensors[0]), parameters)
    entry = _entries.get(place)
    if entry is None or entry.state != state:
        entry = _entries[place] = _Entry(place, tensors, state)
    entry.layouts[kind] = layout


def _places(codes: Tensor) -> list[tuple[int, Parameters]]:
    own = id(codes)
    return [place for place, entry in list(_entries.items()) if any(known[1] == own for known in entry.state)]


def forget(codes: Tensor) -> None:
    """Drop all that was made from the weight of these codes, alone or with others."""
    for place in _places(codes):
        _entries.pop(place, None)


def kept(codes: Tensor) -> dict[str, Tensor]:
    """What is kept that was made from the weight of these codes, by kind; it may be out of date until the next call."""
    found = [_entries[place].layouts for place in _places(codes)]
    return {kind: layout for layouts in found for kind, layout in layouts.items()}


@cache
def _warn_of_inference_tensors() -> None:
    warnings.warn(
        "a quantized weight made under torch.inference_mode() is prepared again in every call, because torch does not "
        "count changes of its tensors; make or load it outside of inference mode, or hold it in a lutgemm layer",
        RuntimeWarning,
        stacklevel=2,
    )
