"""Which algorithm "auto" takes: measured crossing points as data, and the function that reads them.

`lutgemm tune` measures such rows on the user's machine, which then stand in for these; see `tuned`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..accuracy import ACCURACIES
from . import Problem

NO_CROSSING = 2**62

CPU_DEVICE = "AMD EPYC (family 25 model 17), avx512vbmi, 1 thread, N = K = 4096, group_size 128"
CPU_DATE = "2026-11-21"


@dataclass(frozen=True)
class Threshold:
    """Up to `max_cost` (see `look_up_cost`) and `max_tokens`, `algorithm` was faster than what the rows below name.

    max_tokens is for fp32 and fp16 activations, max_tokens_bf16 for bf16, which torch multiplies several times faster.
    Both are the M where the two lines of time against M cross.

    Rows of "dequantize" are about its two ways, where the CPU has both: up to so many tokens tiles of integers that are
    multiplied in cache were faster, beyond them panels that torch multiplies. From `min_tokens` on tiles were also
    faster than look-ups. They hold for costs above the row before, not for all below their own.
    """

    op: str
    algorithm: str
    max_cost: float
    max_tokens: int
    max_tokens_bf16: int
    integer_tables: bool = False
    """The row is for kernels of integer tables (accuracy below "exact", AVX-512; measured with VBMI)."""
    device: str = CPU_DEVICE
    date: str = CPU_DATE
    min_tokens: int = 0
    accuracy: str = ""
    """min_tokens and accuracy ("fast" or "accurate"): only of rows of "dequantize"."""


CPU_THRESHOLDS = (
    Threshold("bcq_linear", "lut_gemm", 8, 1, 1),
    Threshold("bcq_linear", "biqgemm", 1, NO_CROSSING, NO_CROSSING),
    Threshold("bcq_linear", "biqgemm", 2, NO_CROSSING, 100),
    Threshold("bcq_linear", "biqgemm", 3, 500, 48),
    Threshold("bcq_linear", "biqgemm", 4, 68, 34),
    Threshold("bcq_linear", "biqgemm", 6, 28, 22),
    Threshold("bcq_linear", "biqgemm", 8, 20, 18),
    Threshold("bcq_linear", "lut_gemm", 8, 1, 1, integer_tables=True),
    Threshold("bcq_linear", "biqgemm", 3, NO_CROSSING, NO_CROSSING, integer_tables=True),
    Threshold("bcq_linear", "biqgemm", 4, NO_CROSSING, 320, integer_tables=True),
    Threshold("bcq_linear", "biqgemm", 6, NO_CROSSING, 86, integer_tables=True),
    Threshold("bcq_linear", "biqgemm", 8, 328, 60, integer_tables=True),
    Threshold("bcq_linear", "dequantize", 2, NO_CROSSING, NO_CROSSING, True, min_tokens=NO_CROSSING, accuracy="fast"),
    Threshold("bcq_linear", "dequantize", 3, NO_CROSSING, NO_CROSSING, True, min_tokens=16, accuracy="fast"),
    Threshold("bcq_linear", "dequantize", 4, NO_CROSSING, NO_CROSSING, True, min_tokens=8, accuracy="fast"),
    Threshold("bcq_linear", "dequantize", 6, NO_CROSSING, NO_CROSSING, True, min_tokens=6, accuracy="fast"),
    Threshold("bcq_linear", "dequantize", 8, NO_CROSSING, NO_CROSSING, True, min_tokens=5, accuracy="fast"),
    Threshold("bcq_linear", "dequantize", 3, NO_CROSSING, 1400, True, min_tokens=NO_CROSSING, accuracy="accurate"),
    Threshold("bcq_linear", "dequantize", 4, NO_CROSSING, 1400, True, min_tokens=40, accuracy="accurate"),
    Threshold("bcq_linear", "dequantize", 5, NO_CROSSING, 1400, True, min_tokens=19, accuracy="accurate"),
    Threshold("bcq_linear", "dequantize", 6, NO_CROSSING, 1400, True, min_tokens=13, accuracy="accurate"),
    Threshold("bcq_linear", "dequantize", 8, NO_CROSSING, 1400, True, min_tokens=9, accuracy="accurate"),
    Threshold("codebook_linear", "codegemm", 1, NO_CROSSING, NO_CROSSING),
    Threshold("codebook_linear", "codegemm", 2, NO_CROSSING, 160),
    Threshold("codebook_linear", "codegemm", 4, 175, 50),
    Threshold("codebook_linear", "codegemm", 8, 37, 29),
    Threshold("codebook_linear", "codegemm", 16, 22, 20),
    Threshold("codebook_linear", "codegemm", 1, NO_CROSSING, NO_CROSSING, integer_tables=True),
    Threshold("codebook_linear", "codegemm", 2, NO_CROSSING, 520, integer_tables=True),
    Threshold("codebook_linear", "codegemm", 4, NO_CROSSING, 73, integer_tables=True),
    Threshold("codebook_linear", "codegemm", 8, 56, 39, integer_tables=True),
    Threshold("codebook_linear", "codegemm", 16, 31, 25, integer_tables=True),
)
"""Rows of one op from the least to the most costly; the first that fits is taken, "dequantize" when none does."""


def look_up_cost(problem: Problem) -> float:
    """Work of a look-up algorithm per weight and token, in BCQ planes: what its time was found proportional to.

    Codebooks: look-ups per 8 weights. Beyond 8 codebook_bits their tables outgrow registers and L1; building and
    reading them took 2 times as long at 10 bits and 4 to 5 times at 12.
    """
    if problem.op == "bcq_linear":
        return problem.planes
    return 8 * problem.planes / problem.vec_len * 2.0 ** (max(0, problem.codebook_bits - 8) / 2)


def tiled_tokens(problem: Problem, rows: tuple[Threshold, ...]) -> tuple[int, int]:
    """From and up to how many tokens tiles are multiplied in cache: from where they beat look-ups, to where panels do.

    (`NO_CROSSING`, 0): never.
    """
    kind, cost = (problem.op, "dequantize", ACCURACIES[problem.accuracy]), look_up_cost(problem)
    for row in rows:
        if (row.op, row.algorithm, row.accuracy) == kind and cost <= row.max_cost:
            return row.min_tokens, row.max_tokens_bf16 if problem.dtype == torch.bfloat16 else row.max_tokens
    return NO_CROSSING, 0


def choose_on_cpu(
    problem: Problem,
    integer_tables: bool = False,
    rows: tuple[Threshold, ...] = CPU_THRESHOLDS,
    tiles: bool = False,
) -> str:
    """The algorithm of the first of `rows` that `problem` fits, or "dequantize".

    integer_tables: whether the look-up kernels for it are those of integer tables. tiles: whether "dequantize" can
    multiply tiles in cache.
    """
    cost = look_up_cost(problem)
    if tiles:
        first, last = tiled_tokens(problem, rows)
        if first <= problem.M <= last:
            return "dequantize"
    for row in rows:
        if row.op != problem.op or row.integer_tables != integer_tables or row.algorithm == "dequantize":
            continue
        tokens = row.max_tokens_bf16 if problem.dtype == torch.bfloat16 else row.max_tokens
        if cost <= row.max_cost and tokens >= problem.M:
            return row.algorithm
    return "dequantize"
