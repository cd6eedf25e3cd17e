"""`codegemm` (`csrc/cuda/codegemm.cu`) and `codebook_mma` (`csrc/cuda/codebook_mma.cu`): codebook weights.

`codegemm` looks inner products up in tables of one token (or two), `codebook_mma` looks centroids up and multiplies
them on tensor cores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...accuracy import EXACT
from . import Algorithm, CodebookRecord, Layout, Ops, kept_layout

UNIT_COLUMNS = 4
TILE_UNITS = 32
CHUNK_ROWS = 32
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
    """The codes as `codegemm` reads them, and the codebooks as fp32.

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
    codebooks = record.codebooks.to(torch.float32).clone(memory_format=torch.contiguous_format)
    return codes.clone(memory_format=torch.contiguous_format), codebooks


def codegemm_scales(record: CodebookRecord, exact: bool) -> Layout:
    """scales [G, rows] and norms [num_codebooks + 1].

    norms: the largest Euclidean norm of each codebook's centroids, a little more than that to outlast rounding; then a
    unit, which is 1 for exact scales in fp32. Others are fp16, in units of a power of two unless stored so: bf16 scales
    lose nothing down to 2**-29 of the largest, and below it at most 2**-40 of that.
    """
    scales = record.scales.to(torch.float32)
    unit = torch.ones((), device=scales.device)
    if not exact and record.scales.dtype != torch.float16:
        exponent = torch.frexp(scales.abs().max()).exponent.clamp(min=-100) - 15
        unit = torch.ldexp(unit, exponent)
        scales = torch.ldexp(scales, -exponent)
    scales = pad(scales.T, (0, -scales.shape[0] % CHUNK_ROWS)).to(torch.float32 if exact else torch.float16)
    norms = record.codebooks.to(torch.float64).square().sum(2).amax(1).sqrt() * (1 + 2**-20)
    return scales.clone(memory_format=torch.contiguous_format), torch.cat([norms.to(torch.float32), unit.view(1)])


def _codegemm(ops: Ops, x: Tensor, record: CodebookRecord, bias: Tensor | None, accuracy: int) -> Tensor:
    wide = record.codes.dtype != torch.uint8
    exact = accuracy == EXACT or wide or record.scales.dtype == torch.float32
    codes, codebooks = kept_layout(record, "cuda codegemm codes", lambda: codegemm_codes(record))
    kind = "cuda codegemm fp32" if exact else "cuda codegemm fp16"
    scales, norms = kept_layout(record, kind, lambda: codegemm_scales(record, exact))
    shape = (record.out_features, record.group_size)
    return ops("_codebook_codegemm_cuda")(x, codes, scales, codebooks, norms, bias, *shape, accuracy)


ALGORITHMS = (Algorithm("codebook_linear", "codegemm", _codegemm),)
