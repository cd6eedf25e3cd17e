"""Fused dequantize and matmul for M >= 16: a tile of W is decoded in registers and multiplied by `tl.dot`.

    y[M, N] = x[M, K] @ w[N, K].T + bias,      w = W as SPEC.md defines it, rounded to x's dtype; sums are fp32

                      BLOCK_K = BLOCK_U units ->
             x       +-----------+----          w, decoded +-----------+----
    BLOCK_M tokens   |           |         BLOCK_N rows    |           |
                     +-----------+----                     +-----------+----
                                      acc[BLOCK_M, BLOCK_N] += x tile @ w tile.T

Grid: (token blocks x row blocks, splits of K); neighbours in the first share rows of W, so codes are read once from
memory. fp16 and bf16 use tensor cores; fp32 is multiplied in fp32 ("ieee"), never in TF32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import bcq_tile, codebook_tile, first_book, store_tile


@triton.jit
def load_x(x_ptr, m, k, M, K):
    """x `[T, BLOCK_K]`; 0 outside."""
    mask = (m < M)[:, None] & (k < K)[None, :]
    return tl.load(x_ptr + m.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0.0)


@triton.jit
def bcq_dequant_gemm_kernel(
    x_ptr, codes_ptr, scales_ptr, offsets_ptr, zeros_ptr, bias_ptr, out_ptr,
    M, N, K, num_words, num_groups, num_steps, steps_per_split,
    BITS: tl.constexpr, KIND: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr,
    GROUP_UNITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    token_blocks = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % token_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // token_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    begin = split * steps_per_split
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(begin, tl.minimum(begin + steps_per_split, num_steps), num_stages=STAGES):
        x = load_x(x_ptr, m, step * BLOCK_U * 32 + tl.arange(0, BLOCK_U * 32), M, K)
        w = bcq_tile(
            step * BLOCK_U + tl.arange(0, BLOCK_U), n, codes_ptr, scales_ptr, offsets_ptr, zeros_ptr,
            N, num_words, num_groups, GROUP_UNITS, BITS, KIND, HAS_OFFSETS,
        )  # fmt: skip
        w = tl.reshape(w.to(x.dtype), [BLOCK_U * 32, BLOCK_N])
        acc = tl.dot(x, w, acc, input_precision="ieee")
    store_tile(acc, out_ptr, bias_ptr, split, m[:, None], n[None, :], M, N, HAS_BIAS, PARTIAL)


@triton.jit
def codebook_dequant_gemm_kernel(
    x_ptr, codes_ptr, codebooks_ptr, scales_ptr, bias_ptr, out_ptr,
    M, N, K, num_vectors, num_groups, num_steps, steps_per_split, end0, end1, end2,
    BOOKS: tl.constexpr, ENTRIES: tl.constexpr, VEC_LEN: tl.constexpr, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr,
    GROUP_UNITS: tl.constexpr, SIBLINGS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    token_blocks = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % token_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // token_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    first = first_book(n, end0, end1, end2, BOOKS, SIBLINGS)
    split = tl.program_id(1)
    begin = split * steps_per_split
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(begin, tl.minimum(begin + steps_per_split, num_steps), num_stages=STAGES):
        x = load_x(x_ptr, m, step * BLOCK_U * VEC_LEN + tl.arange(0, BLOCK_U * VEC_LEN), M, K)
        w = codebook_tile(
            step * BLOCK_U + tl.arange(0, BLOCK_U), n, first, codes_ptr, codebooks_ptr, scales_ptr,
            N, num_vectors, num_groups, GROUP_UNITS, BOOKS, ENTRIES, VEC_LEN,
        )  # fmt: skip
        w = tl.reshape(w.to(x.dtype), [BLOCK_U * VEC_LEN, BLOCK_N])
        acc = tl.dot(x, w, acc, input_precision="ieee")
    store_tile(acc, out_ptr, bias_ptr, split, m[:, None], n[None, :], M, N, HAS_BIAS, PARTIAL)
