"""Which algorithm "auto" takes on a GPU: thresholds as data, and the function that reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import Problem, Reason

UNMEASURED = "estimated from bytes and instruction counts; not measured on any device"
ESTIMATE_DATE = "2026-11-21"


@dataclass(frozen=True)
class GpuThreshold:
    """Up to `max_tokens`, `algorithm` is taken where it can take the problem, before the rows below."""

    op: str
    algorithm: str
    max_tokens: int
    device: str = UNMEASURED
    date: str = ESTIMATE_DATE


GPU_THRESHOLDS = (
    GpuThreshold("bcq_linear", "bit_planes", 16),
    GpuThreshold("bcq_linear", "lut_gemm", 1),
    GpuThreshold("bcq_linear", "biqgemm", 16),
    GpuThreshold("bcq_linear", "dequant_gemm", 256),
    GpuThreshold("codebook_linear", "codegemm", 8),
    GpuThreshold("codebook_linear", "codebook_mma", 16),
    GpuThreshold("codebook_linear", "dequant_gemm", 256),
)
"""Rows of one op by rising M; the first that fits is taken, "dequantize" when none does."""


def choose_on_gpu(
    problem: Problem,
    offered: tuple[str, ...],
    unsupported: Callable[[Problem, str], Reason | None],
    rows: tuple[GpuThreshold, ...] = GPU_THRESHOLDS,
) -> str:
    """The algorithm of the first of `rows` that is offered and takes `problem`, or "dequantize"."""
    for row in rows:
        fits = row.op == problem.op and row.max_tokens >= problem.M and row.algorithm in offered
        if fits and unsupported(problem, row.algorithm) is None:
            return row.algorithm
    return "dequantize"
