"""CodeGEMM (NeurIPS 2025, section 3): the Psumbook is computed once a token, then rows of W only gather from it.

    y[m, n] = sum over g of scales[n, g] * (sum over c, vectors j of g: psums[m, c, j, codes[c, n, j]]) + bias[n]
    psums[m, c, j, e] = sum over i < vec_len of codebooks[c, e, i] * x[m, vec_len * j + i]         (the Psumbook)

    kernel 1                     kernel 2
      x[m] | j | j+1 | ..                  K ->  one step: CHUNKS chunks of CHUNK vectors
           +---+-----+           W       +-------------+----------
    book c | E sums  |           BLOCK_N | codes       | next      gather for BLOCK_M tokens from psums,
      E    | per j   |           rows    |             | codes     times scale, into acc[T, C, N]
           +---+-----+                   +-------------+----------

Grid 1: (vector blocks, books, token blocks x blocks of E). Grid 2: (row blocks x token blocks, splits of K).

The Psumbook of a slice has 2**codebook_bits entries, too many for a warp's lanes (see `lut_gemm.py`), and building it
costs 2**codebook_bits * vec_len multiply-adds for N look-ups. So it is built once for all programs, in fp32, and read
through L1 by computed addresses: K / vec_len * num_codebooks KiB a token at 8 bits, which L2 holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import chunks_of_step, first_book, store_tile


@triton.jit
def psumbook_kernel(
    x_ptr, codebooks_ptr, psums_ptr, M, K, num_vectors, entry_blocks,
    BOOKS: tl.constexpr, ENTRIES: tl.constexpr, VEC_LEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    book = tl.program_id(1)
    m = (tl.program_id(2) // entry_blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    e = tl.program_id(2) % entry_blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    sums = tl.zeros([BLOCK_M, BLOCK_J, BLOCK_E], tl.float32)
    for i in tl.static_range(VEC_LEN):
        k = j * VEC_LEN + i
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        centroid = tl.load(codebooks_ptr + (book * ENTRIES + e) * VEC_LEN + i).to(tl.float32)
        sums += x.to(tl.float32)[:, :, None] * centroid[None, None, :]
    at = ((m * BOOKS + book)[:, None] * num_vectors + j[None, :])[:, :, None] * ENTRIES + e[None, None, :]
    mask = (m < M)[:, None, None] & (j < num_vectors)[None, :, None]
    tl.store(psums_ptr + at, sums, mask=mask)


@triton.jit
def gather(ptr, at, mask, REVERSED: tl.constexpr):
    """Elements at `[T, R, C, N]`, the lanes of a warp along N: see `LANES_ALONG_FIRST` in start.py."""
    if REVERSED:
        found = tl.load(ptr + tl.permute(at, 3, 2, 1, 0), mask=tl.permute(mask, 3, 2, 1, 0), other=0.0)
        return tl.permute(found, 3, 2, 1, 0)
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def codegemm_kernel(
    psums_ptr, codes_ptr, scales_ptr, bias_ptr, out_ptr,
    M, N, num_vectors, num_groups, num_steps, steps_per_split, end0, end1, end2,
    BOOKS: tl.constexpr, ENTRIES: tl.constexpr, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr,
    GROUP_UNITS: tl.constexpr, SIBLINGS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    begin = split * steps_per_split
    row = n.to(tl.int64)[None, None, :] * num_vectors
    token = m[:, None] * (SIBLINGS * BOOKS) + first_book(n, end0, end1, end2, BOOKS, SIBLINGS)[None, :]
    token = token[:, None, None, :] * num_vectors  # 32 bits hold every index: the caller sees to that
    plane_codes = tl.cast(N, tl.int64) * num_vectors
    acc = tl.zeros([BLOCK_M, CHUNKS, BLOCK_N], tl.float32)
    for step in tl.range(begin, tl.minimum(begin + steps_per_split, num_steps), num_stages=STAGES):
        group, inner = chunks_of_step(step, GROUP_UNITS, CHUNK, CHUNKS)
        r = tl.arange(0, CHUNK)[:, None, None]
        vector = (group * GROUP_UNITS + inner)[None, :, None] + r
        live = (inner[None, :, None] + r < GROUP_UNITS) & (vector < num_vectors) & (n < N)[None, None, :]
        for book in tl.static_range(BOOKS):
            codes = tl.load(codes_ptr + book * plane_codes + row + vector, mask=live, other=0)
            at = (token + book * num_vectors + vector[None, :, :, :]) * ENTRIES + codes.to(tl.int32)[None, :, :, :]
            found = gather(psums_ptr, at, live[None, :, :, :] & (m < M)[:, None, None, None], REVERSED)
            if book == 0:
                total = tl.sum(found, 1)
            else:
                total += tl.sum(found, 1)
        scale_at = n.to(tl.int64)[None, :] * num_groups + group[:, None]
        scale = tl.load(scales_ptr + scale_at, mask=(n < N)[None, :] & (group < num_groups)[:, None], other=0.0)
        acc += total * scale.to(tl.float32)[None, :, :]
    store_tile(tl.sum(acc, 1), out_ptr, bias_ptr, split, m[:, None], n[None, :], M, N, HAS_BIAS, PARTIAL)
