"""Siblings with the CUDA kernels: the kernel's layout is made of all rows (`gpu_siblings`).

The stacked weight exists only while that layout is made of it. Codebooks are of each sibling alone: its layouts are put
end to end, and the kernels take the codebooks by row (`csrc/cuda/siblings.h`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from . import Kernel, cuda
from .gpu_layouts import CodebookRecord, Layout, Record, algorithms, aligned
from .gpu_siblings import Engine, Stack

SIBLING_ROWS = 32
"""Siblings with codebooks of their own begin at a multiple: rows that a kernel takes at a time."""

MOST_SIBLINGS = 4
"""With codebooks of their own."""

ROW_DIMENSIONS = {"codegemm": {"codes": 1, "scales": 1}, "codebook_mma": {}}
"""Algorithm -> the layouts in which rows of siblings follow one another along another dimension than the first; in the
first are all others, and codebooks."""

Call = tuple[str, tuple[Any, ...]]
"""The name of an operator, and its arguments behind x."""


@cache
def _overload(namespace: str, name: str) -> Any:
    return getattr(getattr(torch.ops, namespace), name).default


@cache
def _operator(namespace: str, name: str) -> Callable[..., Any]:
    overload = _overload(namespace, name)
    return cast("Callable[..., Any]", getattr(overload, "_op", overload))


def _takes_own_codebooks(algorithm: str, sizes: Sequence[int]) -> bool:
    fits = len(sizes) <= MOST_SIBLINGS and not any(size % SIBLING_ROWS for size in sizes[:-1])
    return fits and algorithm in ROW_DIMENSIONS


def _recorded(op: str, algorithm: str, x: Tensor, record: Record, bias: Tensor | None, accuracy: int) -> Call | None:
    """What `algorithm` would call, the record's layout made if need be; None if that is more than one operator."""
    calls: list[Call] = []

    def recording(name: str) -> Callable[..., Tensor]:
        def call(x: Tensor, *rest: Any) -> Tensor:
            calls.append((name, rest))
            return x.new_empty(x.shape[0], record.out_features)

        return call

    algorithms()[op, algorithm].run(recording, cuda._rows(x), record, bias, accuracy)
    return calls[0] if len(calls) == 1 else None


def _own_codebooks(namespace: str, stack: Stack, x: Tensor, algorithm: str, accuracy: int) -> Call | None:
    if not _takes_own_codebooks(algorithm, stack.sizes):
        return None
    # Of tensors that are gone afterwards, and what is kept beside them with them.
    own = [CodebookRecord(*(t.detach() for t in s.record.tensors), *s.record.parameters) for s in stack.siblings]
    calls = [_recorded("codebook_linear", algorithm, x, record, None, accuracy) for record in own]
    if any(call is None for call in calls):
        return None
    name, arguments = cast(Call, calls[0])
    given = [cast(Call, call)[1] for call in calls]
    names = [argument.name for argument in _overload(namespace, name)._schema.arguments][1:]
    tensors = {place: names[place] for place, first in enumerate(arguments) if isinstance(first, Tensor)}
    dims = ROW_DIMENSIONS[algorithm]

    def make() -> Layout:
        return tuple(aligned(torch.cat([each[i] for each in given], dims.get(of, 0))) for i, of in tensors.items())

    layouts = iter(stack.keep(f"cuda siblings {algorithm} {accuracy} {x.dtype} layouts", make))
    joined = {"bias": stack.joined_bias("cuda"), "N": stack.out_features}
    all_arguments = zip(names, arguments, strict=False)
    rest = [next(layouts) if isinstance(each, Tensor) else joined.get(of, each) for of, each in all_arguments]
    return name, (*rest, stack.ends)


def _call(namespace: str, stack: Stack, x: Tensor, algorithm: str, accuracy: int) -> Call | None:
    if not stack.shared:
        return _own_codebooks(namespace, stack, x, algorithm, accuracy)
    op = "codebook_linear" if stack.is_codebook else "bcq_linear"
    return _recorded(op, algorithm, x, stack, stack.joined_bias("cuda"), accuracy)


def _run(namespace: str, x: Tensor, call: Call) -> Tensor:
    name, arguments = call
    y: Tensor = _operator(namespace, name)(cuda._rows(x), *arguments)
    return y


def _place_of(namespace: str, x: Tensor) -> int:
    return int(_operator(namespace, "_gpu_place")(x))


def engine(namespace: str) -> Engine:
    """Of the operators of `torch.ops.<namespace>`."""
    place_of, call, run = (partial(cast(Any, each), namespace) for each in (_place_of, _call, _run))
    return Engine("cuda", place_of, call, run, _takes_own_codebooks)


_ENGINE = engine("lutgemm")
ENGINES: dict[Kernel, Engine] = {cuda.BACKEND.bcq_linear: _ENGINE, cuda.BACKEND.codebook_linear: _ENGINE}
