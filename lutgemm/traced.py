"""Calls that torch.compile traces: where Triton's kernels would run them, they go into the graph themselves.

    lutgemm.bcq_linear(x, weight) ──► torch.ops.lutgemm.bcq_linear            one opaque node, whose backend is chosen
                                                                              when it runs: every other backend
                                  └─► torch.ops.lutgemm._triton_bcq_linear    kernels and workspaces, which the
                                                                              compiler sees: `kernels/triton/launch.py`

The choice is then made while tracing, and depends on M. A number that the graph was traced for is taken as it is; of
a symbolic M only the class is asked for, so that there is a graph for each class (guards: 8 < M <= 64) and not for each
M. Dynamo reads the functions below, but for `_choice`, which it calls.
"""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor
from torch.compiler import assume_constant_result
from torch.fx.experimental.symbolic_shapes import guard_or_false, has_static_value

from .accuracy import AUTO, resolve_accuracy
from .backends import Problem, registry, select
from .backends import triton as backend
from .errors import LutgemmError

CLASSES = (4, 8, 64, 512)
"""The largest M of each class but the last; every M at which `triton.BACKEND` chooses anew is among them."""
MORE = 4096
"""An M of the last class."""


@assume_constant_result
def _runs_triton(device: str, asked: str) -> bool:
    """Whether a backend by that name is Triton's for all calls on a type of device, but for those that it refuses."""
    able = [b.name for b in registry().values() if device in b.device_types and b.unavailable() is None]
    return able == ["triton"] if asked == AUTO else asked == "triton" and asked in able


@assume_constant_result
def _choice(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    scale_kind: str,
    codebook: tuple[int, ...],
    names: tuple[str, ...],
    symbolic: bool,
) -> tuple[str, list[int]] | None:
    """The algorithm and configuration of a call that Triton's kernels run, None for any other.

    sizes: M, N, K, group_size and planes. codebook: entries and vec_len. names: backend, algorithm and accuracy; wrong
    ones are left to the call to refuse.
    """
    (asked, algorithm, accuracy), (entries, vec_len) = names, codebook
    m, n, k, group_size, planes = sizes
    try:
        level = resolve_accuracy(accuracy)
        format_ = (scale_kind, vec_len, entries.bit_length() - 1)
        problem = Problem(op, device.type, dtype, m, n, k, group_size, planes, *format_, level)
        chosen, algorithm = select(problem, asked, algorithm)
    except LutgemmError:
        return None
    if chosen.name != "triton":
        return None
    config, at_once = backend.plan(problem, algorithm, device.index)
    return None if symbolic and not at_once else (algorithm, config)


def _planned_tokens(m: int, device: str, asked: str) -> int:
    """The M that calls of x `[m, K]` in this graph are planned for; 0 where there is none."""
    if not _runs_triton(device, asked):
        return 0
    if has_static_value(m):
        return m
    for most in CLASSES:
        if guard_or_false(m <= most):
            return most
    return MORE if guard_or_false(m > CLASSES[-1]) else 0


def _specialized(*sizes: int) -> tuple[int, ...]:
    """Sizes of a weight, which a graph is for; with `dynamic=True` even they are symbolic."""
    return tuple([index(size) for size in sizes])


def bcq_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    ratios: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    scale_kind: str,
    *names: str,
) -> Tensor:
    """What `torch.ops.lutgemm.bcq_linear` computes, where possible by an operator that the compiler sees through."""
    operators, m = torch.ops.lutgemm, x.shape[0]
    record = (codes, scales, offsets, zeros, ratios, bias)
    planned = _planned_tokens(m, x.device.type, names[0])
    if planned:
        n, k, group, bits = _specialized(codes.shape[1], x.shape[1], group_size, codes.shape[0])
        sizes, symbolic = (planned, n, k, group, bits), not has_static_value(m)
        found = _choice("bcq_linear", x.device, x.dtype, sizes, scale_kind, (0, 0), names, symbolic)
        if found is not None:
            given = [None if t is None else t.contiguous() for t in record]
            return operators._triton_bcq_linear(x.contiguous(), *given, min(group, k), scale_kind, *found)
    return operators.bcq_linear(x, *record, group_size, scale_kind, *names)


def codebook_linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, *names: str
) -> Tensor:
    """What `torch.ops.lutgemm.codebook_linear` computes, as `bcq_linear`."""
    operators, m = torch.ops.lutgemm, x.shape[0]
    record = (codes, codebooks, scales, bias)
    planned = _planned_tokens(m, x.device.type, names[0])
    if planned:
        n, k, group, books = _specialized(codes.shape[1], x.shape[1], group_size, codes.shape[0])
        sizes, symbolic = (planned, n, k, group, books), not has_static_value(m)
        codebook = _specialized(codebooks.shape[1], codebooks.shape[2])
        found = _choice("codebook_linear", x.device, x.dtype, sizes, "", codebook, names, symbolic)
        if found is not None:
            given = [None if t is None else t.contiguous() for t in record]
            return operators._triton_codebook_linear(x.contiguous(), *given, min(group, k), *found)
    return operators.codebook_linear(x, *record, group_size, *names)
