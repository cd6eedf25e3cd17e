"""Which algorithm "auto" takes on a GPU: thresholds as data, and the function that reads them.

`lutgemm tune --device cuda` measures such rows on the user's GPU, which then go before these; see `tuned_gpu`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..accuracy import ACCURACIES
from . import Problem, Reason
from .heuristics import look_up_cost

UNMEASURED = "estimated from bytes and instruction counts; not measured on any device"
ESTIMATE_DATE = "2026-11-21"


@dataclass(frozen=True)
class GpuThreshold:
    """Up to `max_tokens`, `algorithm` is taken where it can take the problem, before the rows below.

    The other fields say which problems the row is for; their defaults are for all.
    """

    op: str
    algorithm: str
    max_tokens: int
    device: str = UNMEASURED
    date: str = ESTIMATE_DATE
    scale_kind: str = ""
    """"uniform", which some kernels store in another way, or "" """
    max_cost: float = math.inf
    """As `look_up_cost` has it: planes of BCQ, codes for 8 weights of codebooks."""
    max_x_bytes: int = 4
    """Of an activation: 2 (fp16, bf16) or 4 (fp32)."""
    max_accuracy: str = ACCURACIES[-1]

    def holds_for(self, problem: Problem) -> bool:
        """Whether the row says anything about the problem, its number of tokens apart."""
        return (
            self.op == problem.op
            and self.scale_kind in ("", problem.scale_kind)
            and look_up_cost(problem) <= self.max_cost
            and problem.dtype.itemsize <= self.max_x_bytes
            and problem.accuracy <= ACCURACIES.index(self.max_accuracy)
        )


GPU_THRESHOLDS = (
    GpuThreshold("bcq_linear", "bit_planes", 16, scale_kind="uniform"),
    GpuThreshold("bcq_linear", "lut_gemm", 1),
    GpuThreshold("bcq_linear", "biqgemm", 2),
    GpuThreshold("bcq_linear", "bit_planes", 8),
    GpuThreshold("bcq_linear", "sign_planes", 16),
    GpuThreshold("bcq_linear", "dequant_gemm", 256),
    GpuThreshold("codebook_linear", "codegemm", 1),
    GpuThreshold("codebook_linear", "codebook_mma", 64),
    GpuThreshold("codebook_linear", "codegemm", 8),
    GpuThreshold("codebook_linear", "codebook_mma", 128, max_cost=2.0),
    GpuThreshold("codebook_linear", "codebook_mma", 1024, max_cost=2.0, max_accuracy="accurate"),
)
"""In the order in which they are tried: the first that fits is taken, "dequantize" when none does."""


def choose_on_gpu(
    problem: Problem,
    offered: tuple[str, ...],
    unsupported: Callable[[Problem, str], Reason | None],
    rows: tuple[GpuThreshold, ...] | None = None,
) -> str:
    """The algorithm of the first of `rows` that fits, is offered and takes `problem`, or "dequantize".

    rows: None for those of the user's GPU where they were measured, before the built-in ones. Measured rows are of
    GPUs: the kernels on another kind of device, which is the tests' emulator, are chosen by the built-in ones.
    """
    if rows is None:
        from . import tuned_gpu

        rows = tuned_gpu.rows() if problem.device == "cuda" else GPU_THRESHOLDS
    for row in rows:
        fits = row.max_tokens >= problem.M and row.holds_for(problem) and row.algorithm in offered
        if fits and unsupported(problem, row.algorithm) is None:
            return row.algorithm
    return "dequantize"
