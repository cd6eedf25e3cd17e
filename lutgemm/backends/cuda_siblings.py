"""Sibling layers on a GPU: one kernel call over their rows, stacked.

    y[M, N1 + N2 + ...] = x[M, K] @ [W1; W2; ...].T + [b1, b2, ...]

The stacked weight exists only while the kernel's layout is made of it. That layout is kept beside the tensors of all
siblings (`prepared`), biases included, so that a change of any is seen. How a kernel splits K depends on the number of
rows, so that results may differ from those of separate calls in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import Kernel, cuda, prepared
from .gpu_layouts import BcqRecord, Layout, algorithms, aligned, kept_layout
from .prepared import Ready, State, Tensors

NAMES = ("codes", "scales", "offsets", "zeros", "ratios", "bias")
"""Of the tensors that each sibling gives."""

NAMESPACES: dict[Kernel, str] = {cuda.BACKEND.bcq_linear: "lutgemm"}
"""`bcq_linear` of a backend -> where torch has the operators behind it."""


class Sibling(NamedTuple):
    """One layer."""

    record: BcqRecord
    bias: Tensor | None

    @property
    def tensors(self) -> Tensors:
        """Those of `NAMES`."""
        return (*self.record.tensors, self.bias)


class _Stack:
    """The record that algorithms read: a `BcqRecord` of all rows, whose layouts are kept by the siblings' tensors."""

    def __init__(self, record: BcqRecord, tensors: Tensors, parameters: tuple[Any, ...]) -> None:
        self._record, self.tensors, self.parameters = record, tensors, parameters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._record, name)


class _Share(NamedTuple):
    """As much of an `Entry` as `Ready` reads: one sibling's tensors, and the layouts of all."""

    state: State
    layouts: dict[str, Any]


@cache
def _operator(namespace: str, name: str) -> Callable[..., Any]:
    overload = getattr(getattr(torch.ops, namespace), name).default
    return cast("Callable[..., Any]", getattr(overload, "_op", overload))


def place_of(x: Tensor, kernel: Kernel) -> int:
    """A number for the stream or the capture of a CUDA graph that takes up work on x now. Results that were made in
    another one may not be there yet, or not before a replay."""
    return int(_operator(NAMESPACES[kernel], "_gpu_place")(x))


def _described(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What tensors must have in common to be stacked, rows apart."""
    return None if tensor is None else (tensor.dtype, tensor.device)


def _alike(siblings: Sequence[Sibling], x: Tensor) -> bool:
    """Whether rows can be stacked: what is left to compare then is the values of `ratios`."""
    first = siblings[0]
    for record, bias in siblings:
        same = record.bits == first.record.bits and record.parameters == first.record.parameters
        tensors = [None if t is None else _described(t) for t in record.tensors]
        if not same or tensors != [_described(t) for t in first.record.tensors] or record.codes.device != x.device:
            return False
        if (bias is None) != (first.bias is None):
            return False
        if bias is not None and (bias.shape != (record.out_features,) or _described(bias) != (x.dtype, x.device)):
            return False
    return True


def _joined(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there, dim) if there else None


def _stacked(siblings: Sequence[Sibling]) -> BcqRecord:
    """The record of all rows, in new memory but for `ratios`."""
    codes, scales, offsets, zeros, ratios = zip(*(sibling.record.tensors for sibling in siblings), strict=True)
    joined = _joined(codes, 1), _joined(scales, 1), _joined(offsets, 0), _joined(zeros, 0)
    first = siblings[0].record
    return BcqRecord(*joined, ratios[0], first.in_features, first.group_size, first.scale_kind)  # type: ignore[arg-type]


def _same_ratios(siblings: Sequence[Sibling]) -> bool:
    first = siblings[0].record.ratios
    return first is None or all(torch.equal(first, cast(Tensor, s.record.ratios)) for s in siblings[1:])


def _kept_call(
    siblings: Sequence[Sibling], tensors: Tensors, parameters: tuple[Any, ...], x: Tensor, algorithm: str, accuracy: int
) -> tuple[str, tuple[Any, ...]] | None:
    """The operator that computes all siblings and its arguments behind x, their layout made if need be.

    None if `ratios` differ, or the algorithm makes more than one call.
    """
    if not _same_ratios(siblings):
        return None
    stack = _Stack(_stacked(siblings), tensors, parameters)
    bias: Tensor | None = None
    if siblings[0].bias is not None:
        make: Callable[[], Layout] = lambda: (aligned(torch.cat([cast(Tensor, s.bias) for s in siblings])),)  # noqa: E731
        (bias,) = kept_layout(stack, "cuda siblings bias", make)
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def recorded(name: str) -> Callable[..., Tensor]:
        def call(x: Tensor, *rest: Any) -> Tensor:
            calls.append((name, rest))
            return x.new_empty(x.shape[0], stack.out_features)

        return call

    algorithms()["bcq_linear", algorithm].run(recorded, cuda._rows(x), stack, bias, accuracy)
    return calls[0] if len(calls) == 1 else None


def plan(siblings: Sequence[Sibling], x: Tensor, kernel: Kernel, algorithm: str, accuracy: int) -> list[Ready] | None:
    """How to compute all `siblings` in one call of `algorithm`, one `Ready` each; None where they cannot be stacked.

    The layouts of all `Ready` are one: operator and arguments behind x. `tail`: `Siblings`.
    None of them, where there is no layout yet and a CUDA graph is being captured (what would be made then has no values
    before the replay), or torch does not count the changes of a tensor.
    """
    if algorithm == "dequantize" or not _alike(siblings, x):
        return None
    tensors = tuple(tensor for sibling in siblings for tensor in sibling.tensors)
    parameters = ("siblings", *((s.record.out_features, *s.record.parameters, s.bias is None) for s in siblings))
    kind = f"cuda siblings {algorithm} {accuracy} {x.dtype}"
    if prepared.find(tensors, parameters, kind) is None:
        if any(t is not None and t.is_inference() for t in tensors) or place_of(x, kernel) < 0:
            return []
        state = prepared.state_of(tensors)
        with torch.no_grad():
            call: Any = _kept_call(siblings, tensors, parameters, x, algorithm, accuracy)
        if call is None:
            return None
        prepared.keep(tensors, parameters, state, kind, call)
    entry = prepared.entry_of(tensors, parameters)
    if entry is None:  # a tensor has changed meanwhile
        return []
    tail = (Siblings(kernel, tuple(s.record.out_features for s in siblings), siblings[0].bias is not None),)
    made = []
    for number, sibling in enumerate(siblings):
        begin = number * len(NAMES)
        own = tuple((i - begin, *rest) for i, *rest in entry.state if begin <= i < begin + len(NAMES))
        share: Any = _Share(cast(State, own), entry.layouts)
        made.append(Ready(kernel, NAMES, sibling.tensors, share, kind, tail))
    return made


class Siblings(NamedTuple):
    """What is known of siblings that are computed over stacked rows."""

    kernel: Kernel
    sizes: tuple[int, ...]
    biased: bool

    def run(self, x: Tensor, layout: Any) -> list[Tensor | None]:
        """The results of all, for x `[..., K]`: contiguous, each with a version of its own.

        Of one token they share one row of memory, side by side; more are copied out of the rows of all.
        """
        name, arguments = layout
        rows = _operator(NAMESPACES[self.kernel], name)(cuda._rows(x), *arguments)
        parts = rows.view(*x.shape[:-1], rows.shape[1]).split(self.sizes, -1)
        if rows.shape[0] == 1:
            return [part.data for part in parts]
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]
