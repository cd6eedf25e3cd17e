"""Which algorithm "auto" takes: measured crossing points as data, and the function that reads them.

`choose_on_cpu` takes the first row that fits the problem, or else "dequantize".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import Problem

CPU_DEVICE = "AMD EPYC (Zen 4, AVX-512), 1 thread, N = K = 4096, group_size 128"
CPU_DATE = "2026-11-21"


@dataclass(frozen=True)
class Threshold:
    """Up to `max_tokens` tokens, `algorithm` was the fastest for up to `max_planes` planes (bits or num_codebooks)."""

    op: str
    algorithm: str
    max_planes: int
    max_tokens: int
    """with fp32 activations"""
    max_tokens_bf16: int
    """with bf16 activations, which dequantize-and-matmul multiplies several times faster"""
    device: str = CPU_DEVICE
    date: str = CPU_DATE


CPU_THRESHOLDS = (
    Threshold("bcq_linear", "lut_gemm", 8, 1, 1),
    Threshold("bcq_linear", "biqgemm", 1, 256, 64),
    Threshold("bcq_linear", "biqgemm", 2, 128, 32),
    Threshold("bcq_linear", "biqgemm", 4, 64, 16),
    Threshold("bcq_linear", "biqgemm", 8, 32, 8),
    Threshold("codebook_linear", "codegemm", 1, 64, 16),
    Threshold("codebook_linear", "codegemm", 2, 32, 8),
    Threshold("codebook_linear", "codegemm", 4, 16, 4),
)


def choose_on_cpu(problem: Problem) -> str:
    """The algorithm of the first row of `CPU_THRESHOLDS` that `problem` fits, or "dequantize"."""
    for row in CPU_THRESHOLDS:
        tokens = row.max_tokens_bf16 if problem.dtype == torch.bfloat16 else row.max_tokens
        if row.op == problem.op and problem.planes <= row.max_planes and tokens >= problem.M:
            return row.algorithm
    return "dequantize"
