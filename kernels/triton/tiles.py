"""What the kernels share: how K is cut, tables of signed sums and look-ups in them, decoded tiles, the store of y.

A *unit* is what one stored code covers: a word of 32 weights (BCQ) or a vector of vec_len weights (codebooks). K is cut
into *chunks* of CHUNK units, none of which spans two groups, so that one scale serves a chunk:

    units     | 0 1 2 3 | 4 5 6 7 | 8 9 . . | 10 ..        GROUP_UNITS = 10, CHUNK = 4: the third chunk of a group
    chunks    |    0    |    1    |    2    |    3         is cut short, its other two units are masked
    groups    |-------------- 0 ------------|---- 1

A step of a kernel takes CHUNKS chunks side by side. Index names in shapes: T tokens, I nibbles of a word, R units of a
chunk, C chunks of a step, N rows of W, B blocks of 16 of them. All arithmetic is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

FREE = tl.constexpr(0)
UNIFORM = tl.constexpr(1)
RATIO = tl.constexpr(2)
"""Places in `formats.bcq.SCALE_KINDS`."""


@triton.jit
def chunks_of_step(step, GROUP_UNITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The groups `[C]` of a step's chunks, and where in its group each begins, in units."""
    per_group: tl.constexpr = (GROUP_UNITS + CHUNK - 1) // CHUNK
    chunk = step * CHUNKS + tl.arange(0, CHUNKS)
    return chunk // per_group, chunk % per_group * CHUNK


@triton.jit
def words_of_step(step, num_words, GROUP_UNITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The groups `[C]` of a step's chunks, their words `[R, C]`, and which of these exist."""
    group, begin = chunks_of_step(step, GROUP_UNITS, CHUNK, CHUNKS)
    inner = begin[None, :] + tl.arange(0, CHUNK)[:, None]
    word = group[None, :] * GROUP_UNITS + inner
    return group, word, (inner < GROUP_UNITS) & (word < num_words)


@triton.jit
def signed_sums(x_ptr, m, word, exists, M, K):
    """Tables `[T, I, R, C, 16]` and sums of x `[T, C]` of a step's chunks.

    Entry e of the table of four activations is the sum of +x[j] where bit j of e is set and of -x[j] where it is not.
    """
    entry = tl.arange(0, 16)
    k_begin = word[None, :, :] * 32 + tl.arange(0, 8)[:, None, None] * 4
    row = (x_ptr + m.to(tl.int64) * K)[:, None, None, None]
    live = (m < M)[:, None, None, None] & exists[None, None, :, :]
    for j in tl.static_range(4):
        k = (k_begin + j)[None, :, :, :]
        x = tl.load(row + k, mask=live & (k < K), other=0.0).to(tl.float32)
        sign = (((entry >> j) & 1) * 2 - 1).to(tl.float32)
        term = x[:, :, :, :, None] * sign[None, None, None, None, :]
        if j == 0:
            table = term
            total = x
        else:
            table += term
            total += x
    return table, tl.sum(tl.sum(total, 1), 1)


@triton.jit
def rows_of_block(block, BLOCK_N: tl.constexpr):
    """The rows `[B, 16]` of a block of BLOCK_N: sixteen of them are looked up side by side."""
    return block * BLOCK_N + tl.arange(0, BLOCK_N // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]


@triton.jit
def look_up(table, words):
    """Table entries `[T, I, R, C, 16]` of code words `[B, R, C, 16]`, summed over each chunk: `[B, T, C, 16]`.

    Sixteen lanes of a warp hold a table, one entry each, and look up sixteen rows: one warp shuffle. Triton spreads the
    dimension of a gather over lanes by its length, so the rows are cut in sixteens, as long as the tables.
    """
    B: tl.constexpr = words.shape[0]
    T: tl.constexpr = table.shape[0]
    R: tl.constexpr = words.shape[1]
    C: tl.constexpr = words.shape[2]
    shift = (tl.arange(0, 8) * 4)[None, :, None, None, None]
    nibble = (words[:, None, :, :, :] >> shift) & 15
    index = tl.broadcast_to(nibble[:, None, :, :, :, :], [B, T, 8, R, C, 16])
    found = tl.gather(tl.broadcast_to(table[None, :, :, :, :, :], [B, T, 8, R, C, 16]), index, 5)
    return tl.sum(tl.sum(found, 2), 2)


@triton.jit
def load_scale(scales_ptr, ratios_ptr, plane, offset, mask, plane_scales, KIND: tl.constexpr):
    """fp32 scales of a plane at `offset` = n * G + g; 0 where masked."""
    if KIND == FREE:
        return tl.load(scales_ptr + plane * plane_scales + offset, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scales_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if KIND == RATIO:
        scale = scale * tl.load(ratios_ptr + plane)
    return scale


@triton.jit
def bcq_sums(
    table, x_sum, group, word, exists, n, codes_ptr, scales_ptr, offsets_ptr, zeros_ptr, ratios_ptr,
    N, num_words, num_groups, BITS: tl.constexpr, KIND: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    """x times W of a step's chunks for rows n `[B, 16]`, one sum per token and chunk: fp32 `[B, T, C, 16]`."""
    in_n = (n < N)[:, None, None, :]
    code = n.to(tl.int64)[:, None, None, :] * num_words + word[None, :, :, None]
    scale_at = n.to(tl.int64)[:, None, :] * num_groups + group[None, :, None]
    in_group = (n < N)[:, None, :] & (group < num_groups)[None, :, None]
    plane_words = tl.cast(N, tl.int64) * num_words
    plane_scales = tl.cast(N, tl.int64) * num_groups
    for plane in tl.static_range(BITS):
        words = tl.load(codes_ptr + plane * plane_words + code, mask=exists[None, :, :, None] & in_n, other=0)
        term = look_up(table, words)
        if KIND == UNIFORM:
            term *= 2.0 ** (BITS - 2 - plane)
        else:
            scale = load_scale(scales_ptr, ratios_ptr, plane, scale_at, in_group, plane_scales, KIND)
            term *= scale[:, None, :, :]
        if plane == 0:
            total = term
        else:
            total += term
    if KIND == UNIFORM:
        zero = tl.load(zeros_ptr + scale_at, mask=in_group, other=0).to(tl.float32)
        scale = load_scale(scales_ptr, ratios_ptr, 0, scale_at, in_group, plane_scales, KIND)
        total += ((2.0**BITS - 1) / 2 - zero)[:, None, :, :] * x_sum[None, :, :, None]
        total *= scale[:, None, :, :]
    elif HAS_OFFSETS:
        offset = tl.load(offsets_ptr + scale_at, mask=in_group, other=0.0).to(tl.float32)
        total += offset[:, None, :, :] * x_sum[None, :, :, None]
    return total


@triton.jit
def bcq_tile(
    word, n, codes_ptr, scales_ptr, offsets_ptr, zeros_ptr, N, num_words, num_groups,
    GROUP_UNITS: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    """W, free or uniform, of rows n and words `[U]`, by SPEC.md and rounding by rounding: fp32 `[U, 32, N]`.

    N comes last because lanes are laid along the last dimension: a thread then decodes whole words of few rows, and
    keeps few addresses and scales.
    """
    row = n.to(tl.int64)[None, :]
    live = (n < N)[None, :] & (word < num_words)[:, None]
    scale_at = row * num_groups + (word // GROUP_UNITS)[:, None]
    plane_words = tl.cast(N, tl.int64) * num_words
    plane_scales = tl.cast(N, tl.int64) * num_groups
    for plane in tl.static_range(BITS):
        words = tl.load(codes_ptr + plane * plane_words + row * num_words + word[:, None], mask=live, other=0)
        bit = (words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
        if KIND == UNIFORM:
            if plane == 0:
                zero = tl.load(zeros_ptr + scale_at, mask=live, other=0).to(tl.float32)
                w = ((2.0**BITS - 1) / 2 - zero)[:, None, :]
            place = 2.0 ** (BITS - 2 - plane)
            w += tl.where(bit != 0, place, -place)
        else:
            scale = tl.load(scales_ptr + plane * plane_scales + scale_at, mask=live, other=0.0)
            scale = scale.to(tl.float32)[:, None, :]
            term = tl.where(bit != 0, scale, -scale)
            if plane == 0 and HAS_OFFSETS:
                w = tl.load(offsets_ptr + scale_at, mask=live, other=0.0).to(tl.float32)[:, None, :] + term
            elif plane == 0:
                w = term
            else:
                w += term
    if KIND == UNIFORM:
        w *= tl.load(scales_ptr + scale_at, mask=live, other=0.0).to(tl.float32)[:, None, :]
    return w


@triton.jit
def first_book(n, end0, end1, end2, BOOKS: tl.constexpr, SIBLINGS: tl.constexpr):
    """Where the codebooks of rows n begin, of SIBLINGS stacked weights that end before the rows end0, end1, ..."""
    sibling = tl.zeros_like(n)
    if SIBLINGS > 1:
        sibling += (n >= end0).to(tl.int32)
    if SIBLINGS > 2:
        sibling += (n >= end1).to(tl.int32)
    if SIBLINGS > 3:
        sibling += (n >= end2).to(tl.int32)
    return sibling * BOOKS


@triton.jit
def codebook_tile(
    vector, n, first, codes_ptr, codebooks_ptr, scales_ptr, N, num_vectors, num_groups,
    GROUP_UNITS: tl.constexpr, BOOKS: tl.constexpr, ENTRIES: tl.constexpr, VEC_LEN: tl.constexpr,
):  # fmt: skip
    """W of rows n, whose codebooks begin at `first`, and vectors `[U]` as SPEC.md defines it, rounding by rounding:
    fp32 `[U, VEC_LEN, N]`."""
    row = n.to(tl.int64)[None, :]
    live = (n < N)[None, :] & (vector < num_vectors)[:, None]
    plane_codes = tl.cast(N, tl.int64) * num_vectors
    for book in tl.static_range(BOOKS):
        codes = tl.load(codes_ptr + book * plane_codes + row * num_vectors + vector[:, None], mask=live, other=0)
        entry = (first[None, :] + book) * ENTRIES + codes.to(tl.int32)
        at = entry[:, None, :] * VEC_LEN + tl.arange(0, VEC_LEN)[None, :, None]
        centroid = tl.load(codebooks_ptr + at).to(tl.float32)
        if book == 0:
            w = centroid
        else:
            w += centroid
    scale = tl.load(scales_ptr + row * num_groups + (vector // GROUP_UNITS)[:, None], mask=live, other=0.0)
    return w * scale.to(tl.float32)[:, None, :]


@triton.jit
def store_tile(y, out_ptr, bias_ptr, split, m, n, M, N, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr):
    """y plus bias into out `[M, N]`, or as it is into its part of out `[splits, M, N]`.

    m and n, tokens and rows, have y's dimensions, of length 1 where y does not depend on them.
    """
    if HAS_BIAS and not PARTIAL:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    at = (split.to(tl.int64) * M + m) * N + n
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(m < M) & (n < N))
