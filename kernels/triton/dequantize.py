"""Dequantize: W written out in x's dtype, panel by panel, for a plain matmul. For large M, where that costs little.

    w[n - row_begin, k] = W[n, k] as SPEC.md defines it, every operation rounded, then rounded to w's dtype

                 K ->
           +-------------+------
    BLOCK_N| BLOCK_U     |              a word becomes 32 elements, a vector VEC_LEN
    rows   | units       |
           +-------------+------

Grid: (row blocks, unit blocks). No product here feeds a sum, so the compiler has nothing to fuse, and the elements
have the bits that `weight.dequantize()` has. A weight of the ratio kind is brought into its free form first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import bcq_tile, codebook_tile


@triton.jit
def bcq_dequantize_kernel(
    codes_ptr, scales_ptr, offsets_ptr, zeros_ptr, w_ptr,
    N, K, num_words, num_groups, row_begin, row_end,
    BITS: tl.constexpr, KIND: tl.constexpr, HAS_OFFSETS: tl.constexpr, GROUP_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    n = row_begin + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    w = bcq_tile(
        word, n, codes_ptr, scales_ptr, offsets_ptr, zeros_ptr, N, num_words, num_groups,
        GROUP_UNITS, BITS, KIND, HAS_OFFSETS,
    )  # fmt: skip
    k = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    at = (n - row_begin).to(tl.int64)[None, None, :] * K + k[:, :, None]
    mask = (n < row_end)[None, None, :] & (k < K)[:, :, None]
    tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=mask)


@triton.jit
def codebook_dequantize_kernel(
    codes_ptr, codebooks_ptr, scales_ptr, w_ptr, N, K, num_vectors, num_groups, row_begin, row_end,
    BOOKS: tl.constexpr, ENTRIES: tl.constexpr, VEC_LEN: tl.constexpr, GROUP_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    n = row_begin + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    vector = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    w = codebook_tile(
        vector, n, tl.zeros_like(n), codes_ptr, codebooks_ptr, scales_ptr, N, num_vectors, num_groups,
        GROUP_UNITS, BOOKS, ENTRIES, VEC_LEN,
    )  # fmt: skip
    k = vector[:, None] * VEC_LEN + tl.arange(0, VEC_LEN)[None, :]
    at = (n - row_begin).to(tl.int64)[None, None, :] * K + k[:, :, None]
    mask = (n < row_end)[None, None, :] & (k < K)[:, :, None]
    tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=mask)
