"""Sibling layers on a GPU: one kernel call over their rows, stacked.

    y[M, N1 + N2 + ...] = x[M, K] @ [W1; W2; ...].T + [b1, b2, ...]

Backends differ in what a call reads and how it is made: an `Engine` each (`cuda_siblings`, `triton_siblings`). What it
reads is kept beside the tensors of all siblings (`prepared`), biases included, so that a change of any is seen. How a
kernel splits K depends on the number of rows, so that results may differ from those of separate calls in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..formats import BCQWeight, QuantizedWeight
from . import Kernel, prepared
from .gpu_layouts import BcqRecord, CodebookRecord, Layout, Record, aligned, kept_layout
from .prepared import Ready, State, Tensors

BCQ_NAMES = ("codes", "scales", "offsets", "zeros", "ratios")
CODEBOOK_NAMES = ("codes", "codebooks", "scales")


class Sibling(NamedTuple):
    """One layer."""

    record: Record
    bias: Tensor | None

    @property
    def tensors(self) -> Tensors:
        """Those of `names`."""
        return (*self.record.tensors, self.bias)

    @property
    def names(self) -> tuple[str, ...]:
        return (*(BCQ_NAMES if isinstance(self.record, BcqRecord) else CODEBOOK_NAMES), "bias")


def sibling(weight: QuantizedWeight, bias: Tensor | None) -> Sibling:
    """The layer of that weight."""
    tensors, group_size = weight.tensors, weight.layout.group_size
    given: Any
    if isinstance(weight, BCQWeight):
        given = *map(tensors.get, BCQ_NAMES), weight.shape[1], group_size, weight.layout.scale_kind
        return Sibling(BcqRecord(*given), bias)
    given = *map(tensors.get, CODEBOOK_NAMES), weight.shape[1], group_size
    return Sibling(CodebookRecord(*given), bias)


class _Kept(NamedTuple):
    """As much of a record as `kept_layout` reads."""

    tensors: Tensors
    parameters: tuple[Any, ...]
    codes: Tensor


class Stack:
    """What is made of siblings: a record of all rows, whose layouts are kept by the siblings' tensors."""

    def __init__(self, siblings: Sequence[Sibling], tensors: Tensors, parameters: tuple[Any, ...]) -> None:
        self.siblings, self.tensors, self.parameters = siblings, tensors, parameters
        self.sizes = tuple(s.record.out_features for s in siblings)
        self.shared = _all_equal([s.record.codebooks for s in siblings]) if self.is_codebook else True
        """whether one set of codebooks serves all"""

    @property
    def is_codebook(self) -> bool:
        return isinstance(self.siblings[0].record, CodebookRecord)

    @cached_property
    def record(self) -> Record:
        """Of all rows. What is to be kept of it has to be asked for by `keep` first, for its memory."""
        return _stacked(self.siblings, self.shared)

    def keep(self, kind: str, make: Callable[[], Layout]) -> Layout:
        """`kept_layout` of what is not made from `record`, or makes it."""
        return kept_layout(_Kept(self.tensors, self.parameters, self.siblings[0].record.codes), kind, make)

    @property
    def ends(self) -> list[int]:
        """The row behind the last of each sibling."""
        return [sum(self.sizes[: place + 1]) for place in range(len(self.sizes))]

    def joined_bias(self, backend: str) -> Tensor | None:
        """[N1 + N2 + ..]"""
        if self.siblings[0].bias is None:
            return None
        biases = [cast(Tensor, s.bias) for s in self.siblings]
        return self.keep(f"{backend} siblings bias", lambda: (aligned(torch.cat(biases)),))[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.record, name)


class Engine(NamedTuple):
    """How a backend computes siblings."""

    name: str
    """that layouts are kept under"""
    place_of: Callable[[Tensor], int | None]
    """A number for the stream (0 up), or the capture of a CUDA graph (below 0), that takes up work on x now; None for a
    capture that cannot be told from others. Results that were made in another one may not be there yet, or not before a
    replay."""
    call: Callable[[Stack, Tensor, str, int], Any]
    """(stack, x, algorithm, accuracy) -> what `run` takes, its tensors made if need be and kept beside those of the
    siblings; None where one call cannot do it."""
    run: Callable[[Tensor, Any], Tensor]
    """(x [..., K], that) -> [M, N1 + N2 + ..]"""
    takes_own_codebooks: Callable[[str, Sequence[int]], bool]
    """(algorithm, N of each) -> whether siblings whose codebooks differ can be computed by one call"""


@lru_cache(maxsize=1)
def engines() -> dict[Kernel, Engine]:
    """`bcq_linear` or `codebook_linear` of a backend -> its engine."""
    from . import cuda_siblings, triton_siblings

    return {**cuda_siblings.ENGINES, **triton_siblings.ENGINES}


def _all_equal(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all have the same values, or none is there."""
    first = tensors[0]
    return first is None or all(torch.equal(first, cast(Tensor, other)) for other in tensors[1:])


def _described(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What tensors must have in common to be stacked, rows apart."""
    return None if tensor is None else (tensor.dtype, tensor.device)


def _shape(record: Record) -> tuple[Any, ...]:
    books = () if isinstance(record, BcqRecord) else record.codebooks.shape
    return (len(record.codes), *books, *record.parameters)


def _alike(siblings: Sequence[Sibling], x: Tensor) -> bool:
    """Whether rows can be stacked: what is left to compare then is values."""
    first = siblings[0]
    for record, bias in siblings:
        tensors = [_described(t) for t in record.tensors]
        if _shape(record) != _shape(first.record) or tensors != [_described(t) for t in first.record.tensors]:
            return False
        if record.codes.device != x.device or (bias is None) != (first.bias is None):
            return False
        if bias is not None and (bias.shape != (record.out_features,) or _described(bias) != (x.dtype, x.device)):
            return False
    return True


def _joined(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there, dim) if there else None


def _stacked(siblings: Sequence[Sibling], shared: bool) -> Record:
    """The record of all rows, in new memory."""
    tensors = list(zip(*(sibling.record.tensors for sibling in siblings), strict=True))
    first: Any = siblings[0].record
    if isinstance(first, CodebookRecord):
        codes, codebooks, scales = tensors
        books = codebooks[0].clone() if shared else torch.cat(codebooks)
        return CodebookRecord(torch.cat(codes, 1), books, torch.cat(scales), *first.parameters)
    codes, scales, offsets, zeros, ratios = tensors
    own = None if ratios[0] is None else ratios[0].clone()
    joined: Any = _joined(codes, 1), _joined(scales, 1), _joined(offsets, 0), _joined(zeros, 0), own
    return first._replace(**dict(zip(BCQ_NAMES, joined, strict=True)))


def _same_ratios(siblings: Sequence[Sibling]) -> bool:
    return _all_equal([s.record.ratios for s in siblings]) if isinstance(siblings[0].record, BcqRecord) else True


class _Share(NamedTuple):
    """As much of an `Entry` as `Ready` reads: one sibling's tensors, and the layouts of all."""

    state: State
    layouts: dict[str, Any]


class _Found(NamedTuple):
    """What is kept of siblings, and how it is found."""

    call: Any
    tensors: Tensors
    parameters: tuple[Any, ...]
    kind: str


def _find(siblings: Sequence[Sibling], x: Tensor, engine: Engine, algorithm: str, accuracy: int) -> _Found:
    tensors = tuple(tensor for sibling in siblings for tensor in sibling.tensors)
    parameters = ("siblings", *((s.record.out_features, *s.record.parameters, s.bias is None) for s in siblings))
    kind = f"{engine.name} siblings {algorithm} {accuracy} {x.dtype}"
    found = _Found(prepared.find(tensors, parameters, kind), tensors, parameters, kind)
    if found.call is not None:
        return found
    if algorithm == "dequantize" or not _alike(siblings, x):
        return found._replace(call=())
    place = engine.place_of(x)
    if any(t is not None and t.is_inference() for t in tensors) or place is None or place < 0:
        return found
    state, call = prepared.state_of(tensors), None
    with torch.no_grad():
        if _same_ratios(siblings):
            call = engine.call(Stack(siblings, tensors, parameters), x, algorithm, accuracy)
    kept: Any = call or ()
    prepared.keep(tensors, parameters, state, kind, kept)
    return found._replace(call=kept)


def run(siblings: Sequence[Sibling], x: Tensor, kernel: Kernel, algorithm: str, accuracy: int) -> Tensor | None:
    """`[M, N1 + N2 + ..]` for x `[..., K]` by one call of `algorithm`; None where `plan` has none."""
    engine = engines()[kernel]
    found = _find(siblings, x, engine, algorithm, accuracy)
    return engine.run(x, found.call) if found.call else None


def plan(siblings: Sequence[Sibling], x: Tensor, kernel: Kernel, algorithm: str, accuracy: int) -> list[Ready] | None:
    """How to compute all `siblings` in one call of `algorithm`, one `Ready` each; None where they cannot be stacked.

    The layouts of all `Ready` are one: what the engine's `run` takes. `tail`: `Siblings`.
    None of them, where there is no layout yet and a CUDA graph is being captured (what would be made then has no values
    before the replay), or torch does not count the changes of a tensor.
    """
    engine = engines()[kernel]
    call, tensors, parameters, kind = _find(siblings, x, engine, algorithm, accuracy)
    if call == ():
        return None
    entry = prepared.entry_of(tensors, parameters)
    if call is None or entry is None:  # a tensor has changed meanwhile
        return []
    tail = (Siblings(engine, tuple(s.record.out_features for s in siblings), siblings[0].bias is not None),)
    names, made = siblings[0].names, []
    for number, sibling in enumerate(siblings):
        begin = number * len(names)
        own = tuple((i - begin, *rest) for i, *rest in entry.state if begin <= i < begin + len(names))
        share: Any = _Share(cast(State, own), entry.layouts)
        made.append(Ready(kernel, names, sibling.tensors, share, kind, tail))
    return made


class Siblings(NamedTuple):
    """What is known of siblings that are computed over stacked rows."""

    engine: Engine
    sizes: tuple[int, ...]
    biased: bool

    def run(self, x: Tensor, layout: Any, contiguous: bool) -> list[Tensor | None]:
        """The results of all, for x `[..., K]`, each with a version of its own.

        They lie side by side in the rows of one result, `[M, N1 + N2 + ..]`: of one token each is contiguous, of more
        its rows are a stride apart; contiguous: they are copied out, a launch each.
        """
        rows = self.engine.run(x, layout)
        parts = rows.view(*x.shape[:-1], rows.shape[-1]).split(self.sizes, -1)
        if contiguous and x.numel() != x.shape[-1]:
            return [part.clone(memory_format=torch.contiguous_format) for part in parts]
        return [part.data for part in parts]
