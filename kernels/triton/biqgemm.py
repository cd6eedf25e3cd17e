"""BiQGEMM (SC 2020) with tables of 16: the tables stay in registers while all rows of W stream past, several tokens.

    y[m, n] = sum over g, b of scales[b, n, g] * (sum over slices s of g: table[m, s][nibble(b, n, s)]) + offsets, bias
    table[m, s][e] = sum over j < 4 of (2 * bit(e, j) - 1) * x[m, 4 * s + j]

                   K ->  one program: CHUNKS chunks of CHUNK words
         x       +----------------+
    BLOCK_M rows | tables of all  |       built once: BLOCK_M * 8 tables a word, an entry per lane
                 +----------------+
    W            | codes of       |  |
    BLOCK_N rows | BITS planes    |  |    look up for every token, times scale, sum over C -> partial y
                 +----------------+  |
    next rows    | ...            |  v    row_blocks_per_program times

Grid: (row parts x token blocks, steps of K). Each step of K writes its own part of a workspace `[steps, M, N]`, which
`reduce.py` sums in order; with a single step it writes y. Where `lut_gemm` builds a table for BLOCK_N * BITS look-ups,
here it serves row_blocks_per_program times as many, and codes are unpacked once for BLOCK_M tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import bcq_sums, rows_of_block, signed_sums, store_tile, words_of_step


@triton.jit
def biqgemm_kernel(
    x_ptr, codes_ptr, scales_ptr, offsets_ptr, zeros_ptr, ratios_ptr, bias_ptr, out_ptr,
    M, N, K, num_words, num_groups, row_blocks, row_blocks_per_program,
    BITS: tl.constexpr, KIND: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr,
    GROUP_UNITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    step = tl.program_id(1)
    row_parts = tl.cdiv(row_blocks, row_blocks_per_program)
    m = tl.program_id(0) // row_parts * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.program_id(0) % row_parts * row_blocks_per_program
    group, word, exists = words_of_step(step, num_words, GROUP_UNITS, CHUNK, CHUNKS)
    table, x_sum = signed_sums(x_ptr, m, word, exists, M, K)
    for block in tl.range(begin, tl.minimum(begin + row_blocks_per_program, row_blocks), num_stages=STAGES):
        n = rows_of_block(block, BLOCK_N)
        sums = bcq_sums(
            table, x_sum, group, word, exists, n, codes_ptr, scales_ptr, offsets_ptr, zeros_ptr, ratios_ptr,
            N, num_words, num_groups, BITS, KIND, HAS_OFFSETS,
        )  # fmt: skip
        y = tl.sum(sums, 2)
        store_tile(y, out_ptr, bias_ptr, step, m[None, :, None], n[:, None, :], M, N, HAS_BIAS, PARTIAL)
