"""LUT-GEMM (ICLR 2024, section 3) with tables of 16: y stays in registers, tables come and go. For a token or a few.

    y[m, n] = sum over g, b of scales[b, n, g] * (sum over slices s of g: table[m, s][nibble(b, n, s)]) + offsets, bias
    table[m, s][e] = sum over j < 4 of (2 * bit(e, j) - 1) * x[m, 4 * s + j]

                 K ->   one step: CHUNKS chunks of CHUNK words
            +--------------+--------------+------
    x       | 8 tables for |              |            built in registers: 16 lanes hold a table, an entry each;
    BLOCK_M | each word    |              |            mostly BLOCK_M = 1
            +--------------+--------------+------
    W       | codes of     | next codes,  |            BITS planes of each step
    BLOCK_N | this step    | on their way |
            +--------------+--------------+------
              look up, times scale, into acc[B, T, C, 16] -> summed over C at the end

Grid: (row blocks x token blocks, splits of K). A table takes 16 * 4 multiply-adds and serves BLOCK_N * BITS look-ups.

Why tables of 16, where the paper has 256: Triton gives a program no table in shared memory that outlives one `gather`,
and a table of 16 needs none. Its entries lie in the lanes of half a warp and a look-up is one `shfl.idx`, of 32 rows or
tables at once and free of bank conflicts: 128 code bits per clock and SM, where look-ups of a byte in a shared table of
256 entries average 2.8 conflicts, 92 code bits. Entries are fp32 at no cost, so every accuracy is "exact".
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import bcq_sums, rows_of_block, signed_sums, store_tile, words_of_step


@triton.jit
def lut_gemm_kernel(
    x_ptr, codes_ptr, scales_ptr, offsets_ptr, zeros_ptr, ratios_ptr, bias_ptr, out_ptr,
    M, N, K, num_words, num_groups, num_steps, steps_per_split,
    BITS: tl.constexpr, KIND: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr,
    GROUP_UNITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = rows_of_block(tl.program_id(0) % row_blocks, BLOCK_N)
    split = tl.program_id(1)
    begin = split * steps_per_split
    acc = tl.zeros([BLOCK_N // 16, BLOCK_M, CHUNKS, 16], tl.float32)
    for step in tl.range(begin, tl.minimum(begin + steps_per_split, num_steps), num_stages=STAGES):
        group, word, exists = words_of_step(step, num_words, GROUP_UNITS, CHUNK, CHUNKS)
        table, x_sum = signed_sums(x_ptr, m, word, exists, M, K)
        acc += bcq_sums(
            table, x_sum, group, word, exists, n, codes_ptr, scales_ptr, offsets_ptr, zeros_ptr, ratios_ptr,
            N, num_words, num_groups, BITS, KIND, HAS_OFFSETS,
        )  # fmt: skip
    y = tl.sum(acc, 2)
    store_tile(y, out_ptr, bias_ptr, split, m[None, :, None], n[:, None, :], M, N, HAS_BIAS, PARTIAL)
