"""`codegemm` (`csrc/cuda/codegemm.cu`) and `codebook_mma` (`csrc/cuda/codebook_mma.cu`): codebook weights.

`codegemm` looks inner products up in tables of one token (or two), `codebook_mma` looks centroids up and multiplies
them on tensor cores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...accuracy import EXACT, NEAR_EXACT
from .. import Problem, Reason
from . import Algorithm, CodebookRecord, Layout, Ops, kept_layout

UNIT_COLUMNS = 4
TILE_UNITS = 32
CHUNK_ROWS = 32
MMA_ROWS = 32
BYTE_BITS = 8
"""Codes up to this many bits are bytes in all layouts."""


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _group_vectors(record: CodebookRecord) -> int:
    """Slices of vec_len inputs in a whole group."""
    whole = record.group_size < record.in_features
    return record.group_size // record.codebooks.shape[2] if whole else record.codes.shape[2]


def _by_groups(record: CodebookRecord) -> Tensor:
    """codes [num_codebooks, N, J] -> [N, G, slices of a group, num_codebooks], with code 0 where there is none."""
    num_codebooks, rows, vectors = record.codes.shape
    width = _group_vectors(record)
    codes = pad(record.codes, (0, -vectors % width)).reshape(num_codebooks, rows, -1, width)
    return codes.permute(1, 2, 3, 0)


def codegemm_codes(record: CodebookRecord) -> Layout:
    """The codes as `codegemm` reads them.

    Columns of a group, in the order slice * num_codebooks + codebook, are cut into units of 4, the last of a group
    filled up; units into tiles of 32, one unit for each lane; rows are padded to 32.

        uint8 [tiles, rows / 4, 32 units, 4 rows, 4 columns]    lane l of a warp reads 16 bytes: its unit of 4 rows

        tile 0, rows 0..3    lane 0: row 0 cols 0 1 2 3 | row 1 cols 0 1 2 3 | row 2 .. | row 3 ..
                             lane 1: row 0 cols 4 5 6 7 | ..

    More than 8 bits: int16 [units, rows, 4 columns], lanes being rows.
    """
    num_codebooks, rows, vectors = record.codes.shape
    width = _group_vectors(record)
    codes = _by_groups(record).flatten(2)
    codes = pad(codes, (0, -codes.shape[2] % UNIT_COLUMNS)).reshape(rows, -1, UNIT_COLUMNS)
    last = (vectors - 1) % width + 1
    units = codes.shape[1] - (width * num_codebooks + 3) // UNIT_COLUMNS + (last * num_codebooks + 3) // UNIT_COLUMNS
    codes = pad(codes[:, :units], (0, 0, 0, 0, 0, -rows % CHUNK_ROWS))
    if codes.dtype != torch.uint8:
        codes = codes.permute(1, 0, 2)
    else:
        codes = pad(codes, (0, 0, 0, -units % TILE_UNITS)).reshape(codes.shape[0] // 4, 4, -1, TILE_UNITS, UNIT_COLUMNS)
        codes = codes.permute(2, 0, 3, 1, 4)
    return (codes.clone(memory_format=torch.contiguous_format),)


def _as_fp16(scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 values, of a tensor of `dtype`, as fp16 and their unit, a power of two: 1 for what was fp16.

    What was bf16 loses nothing down to 2**-29 of the largest value, and below that at most 2**-40 of it.
    """
    unit = torch.ones((), device=scales.device)
    if dtype == torch.float16:
        return scales.to(dtype), unit
    exponent = torch.frexp(scales.abs().max()).exponent.clamp(min=-100) - 15
    return torch.ldexp(scales, -exponent).to(torch.float16), torch.ldexp(unit, exponent)


def codegemm_scales(record: CodebookRecord, exact: bool) -> Layout:
    """scales [G, rows], codebooks [num_codebooks, entries, vec_len] and norms [2 * num_codebooks + 1].

    Exact: scales and codebooks in fp32. Else in fp16 (`_as_fp16`), the codebooks each in units of a power of two by
    which their largest value is from 1 to 2 (2**-101 for one of zeros), with zeros up to 8 entries.
    norms: the largest Euclidean norm of each codebook's centroids, a little more than that to outlast rounding; the
    unit of the scales; the unit of each codebook.
    """
    scales, codebooks = record.scales.to(torch.float32), record.codebooks.to(torch.float32)
    unit, book_units = torch.ones(1, device=scales.device), torch.ones(codebooks.shape[0], device=scales.device)
    if not exact:
        scales, unit = _as_fp16(scales, record.scales.dtype)
        peaks = codebooks.abs().amax((1, 2))
        exponents = torch.where(peaks > 0, torch.frexp(peaks).exponent.clamp(min=-100), -100) - 1
        codebooks = torch.ldexp(codebooks, -exponents[:, None, None]).to(torch.float16)
        codebooks = pad(codebooks, (0, 0, 0, max(0, 8 - codebooks.shape[1])))
        book_units = torch.ldexp(book_units, exponents)
    scales = pad(scales.T, (0, -scales.shape[0] % CHUNK_ROWS))
    norms = record.codebooks.to(torch.float64).square().sum(2).amax(1).sqrt() * (1 + 2**-20)
    norms = torch.cat([norms.to(torch.float32), unit.view(1), book_units])
    return *(t.clone(memory_format=torch.contiguous_format) for t in (scales, codebooks)), norms


def _codegemm(ops: Ops, x: Tensor, record: CodebookRecord, bias: Tensor | None, accuracy: int) -> Tensor:
    no_integers = record.codes.dtype != torch.uint8 or record.scales.dtype == torch.float32 or len(record.codes) == 3
    exact = accuracy == EXACT or no_integers
    (codes,) = kept_layout(record, "cuda codegemm codes", lambda: codegemm_codes(record))
    kind = "cuda codegemm fp32" if exact else "cuda codegemm fp16"
    scales, codebooks, norms = kept_layout(record, kind, lambda: codegemm_scales(record, exact))
    shape = (record.out_features, record.group_size)
    return ops("_codebook_codegemm_cuda")(x, codes, scales, codebooks, norms, bias, *shape, accuracy)


def mma_terms(codebook_dtype: torch.dtype, dtype: torch.dtype, accuracy: int) -> int:
    """How many tables of x's dtype stand for a codebook, their sum being its values.

    One is exact where the dtypes are the same, and for bf16 values as fp16 (`_as_fp16`). Elsewhere it rounds as
    `dequantize` does, which is too coarse above "accurate". With two, an fp16 value is exact as bf16, and an fp32 value
    is off by 2**-23 of itself as fp16, about one more rounding, or by 2**-17 as bf16; with three it is exact.
    """
    same = codebook_dtype == dtype or (codebook_dtype, dtype) == (torch.bfloat16, torch.float16)
    if same or accuracy < NEAR_EXACT:
        return 1
    return 3 if accuracy == EXACT and codebook_dtype == torch.float32 and dtype == torch.bfloat16 else 2


def mma_tables(record: CodebookRecord, dtype: torch.dtype, terms: int) -> Layout:
    """tables [terms * num_codebooks, entries, vec_len] of `dtype`, and their unit [1], 1 but for fp16 of others."""
    values = record.codebooks.to(torch.float32)
    unit = torch.ones((), device=values.device)
    if dtype == torch.float16:
        _, unit = _as_fp16(values, record.codebooks.dtype)
        values = values / unit
    parts = []
    for _ in range(terms):
        parts.append(values.to(dtype))
        values = values - parts[-1].to(torch.float32)
    return torch.cat(parts).contiguous(), unit.view(1)


def mma_half_tables(record: CodebookRecord) -> Layout:
    """tables [num_codebooks, entries, vec_len] in fp16, at most 1/2, and their unit [1], a power of two.

    Sums of two, and products with fp16 scales, are then finite.
    """
    values = record.codebooks.to(torch.float32)
    _, unit = _as_fp16(values, torch.float32)
    unit = unit * 2**16
    return (values / unit).to(torch.float16), unit.view(1)


def mma_codes(record: CodebookRecord, terms: int) -> Layout:
    """The codes as `codebook_mma` reads them, each codebook's `terms` times.

    A step is 4 lanes times max(vec_len, 4) inputs of one group; groups are filled up to whole steps. Lane 4 * r + t of
    a warp has the codes of lane t's inputs of the rows r and r + 8 of 16. An item is one code: term, then codebook,
    then slice (two of vec_len 2); the items of a step are filled up to a power of two.

        uint8 [N / 16, even][chunks][8 r][4 t][8 items][rows r, r + 8]     16 bytes a lane
    """
    rows, width = record.out_features, _group_vectors(record)
    slots = max(1, 4 // record.codebooks.shape[2])
    codes = _by_groups(record)
    groups, num_codebooks = codes.shape[1], codes.shape[3]
    codes = pad(codes, (0, 0, 0, -width % (4 * slots))).reshape(rows, groups, -1, 4, slots, num_codebooks)
    last = (record.codes.shape[2] - 1) % width + 1
    steps = (groups - 1) * codes.shape[2] + -(-last // (4 * slots))
    codes = codes.flatten(1, 2)[:, :steps].permute(0, 2, 1, 4, 3).repeat(1, 1, 1, terms, 1).flatten(3)
    items = 1 << (codes.shape[3] - 1).bit_length()
    codes = pad(codes, (0, items - codes.shape[3])).flatten(2)
    codes = pad(codes, (0, -codes.shape[2] % max(items, 8), 0, 0, 0, -rows % MMA_ROWS))
    codes = codes.reshape(-1, 2, 8, 4, codes.shape[2] // 8, 8).permute(0, 4, 2, 3, 5, 1)
    return (codes.clone(memory_format=torch.contiguous_format).flatten(2, 3),)


def mma_scales(record: CodebookRecord, exact: bool) -> Layout:
    """scales [tiles of 32 rows, G, 4 t, 4 f, 2 i], of row 8 * f + 2 * t + i, and their unit [1].

    Not exact: the largest is from 2**14 to 2**15, so that products with centroids are not subnormal.
    """
    scales = record.scales.to(torch.float32)
    unit = torch.ones((), device=scales.device)
    if not exact:
        scales, unit = _as_fp16(scales, torch.float32)
    scales = pad(scales, (0, 0, 0, -scales.shape[0] % MMA_ROWS))
    scales = scales.view(-1, 4, 4, 2, scales.shape[1]).permute(0, 4, 2, 1, 3)
    return scales.clone(memory_format=torch.contiguous_format), unit.view(1)


def _codebook_mma(ops: Ops, x: Tensor, record: CodebookRecord, bias: Tensor | None, accuracy: int) -> Tensor:
    terms = mma_terms(record.codebooks.dtype, x.dtype, accuracy)
    exact = record.scales.dtype == torch.float32 or (record.scales.dtype == torch.bfloat16 and accuracy == EXACT)
    (codes,) = kept_layout(record, f"cuda codebook_mma codes {terms}", lambda: mma_codes(record, terms))
    kind = f"cuda codebook_mma {'fp32' if exact else 'fp16'}"
    scales, scale_unit = kept_layout(record, kind, lambda: mma_scales(record, exact))
    rounded = terms == 1 and accuracy < NEAR_EXACT and len(record.codes) <= 2

    def tables_and_units() -> Layout:
        tables, unit = mma_tables(record, x.dtype, terms)
        if not rounded:
            return tables, torch.cat([unit, scale_unit, unit])
        half_tables, half_unit = mma_half_tables(record)
        if x.dtype == torch.float16:
            tables, unit = half_tables, half_unit
        return tables, torch.cat([unit, scale_unit, half_unit]), half_tables

    tables, units, *half_tables = kept_layout(record, f"{kind} {x.dtype} {terms} {rounded}", tables_and_units)
    rest = (units, bias, record.out_features, record.group_size)
    return ops("_codebook_codebook_mma_cuda")(x, codes, scales, tables, half_tables[0] if rounded else None, *rest)


def _mma_unsupported(problem: Problem) -> Reason | None:
    if problem.dtype == torch.float32:
        return "it multiplies in fp16 or bf16, and x is float32"
    if problem.codebook_bits > BYTE_BITS:
        return f"it takes up to {BYTE_BITS} codebook_bits, and the weight has {problem.codebook_bits}"
    return None


ALGORITHMS = (
    Algorithm("codebook_linear", "codegemm", _codegemm),
    Algorithm("codebook_linear", "codebook_mma", _codebook_mma, _mma_unsupported),
)
