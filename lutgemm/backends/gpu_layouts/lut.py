"""`lut_gemm` and `biqgemm` of `csrc/cuda`: signed sums of 8 activations, looked up by bytes of code.

Both read one layout (`csrc/cuda/lut.h` says what kernels rely on):

    codes   int32 [row tiles, K units, bits, 512]: for a tile of 16 rows, a unit of 1024 inputs and a plane, 2 KiB in
            the order in which a warp reads them, 16 bytes a lane: [4 quads of rows][32 words][4 rows]
    scales  fp16 or fp32 [row tiles, K units, terms, 4 quads, slots, 4 rows]: slot i is the i-th group that the unit
            touches
    unit    fp32 [1], a power of two that multiplies every result

                    word 0          word 1         ...  word 31
    quad 0 (512 B)  rows 0 1 2 3    rows 0 1 2 3   ...                 one load of 16 bytes by each of 32 lanes
    quad 1          rows 4 5 6 7    ...

Scales are kept as fp16 where that is exact, if need be after a multiplication by a power of two, which `unit` undoes:
so are fp16 scales always, and bf16 ones unless their range is extreme. The uniform kind has the terms s / 2 and
2 * ((2**bits - 1) / 2 - zero) if both are exact in fp16; else it is kept in the free form, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...formats.bcq import uniform_center
from . import Algorithm, BcqRecord, Ops, kept_layout

TILE_ROWS = 16
UNIT_WORDS = 32
UNIT_INPUTS = 32 * UNIT_WORDS
LARGEST_EXPONENT = 15
"""Scales that do not fit fp16 as they are become less than 2**15."""


def folded_codes(codes: Tensor) -> Tensor:
    """int32 words of signs -> of folded slices. Each byte, bit i being the sign of input i (1: plus), becomes the entry
    of a half table that has +x[7] in every sum, with bit 7 set where that sum is to be negated."""
    octets = codes.contiguous().view(torch.uint8)
    return torch.where(octets >= 128, octets ^ 128, ~octets).view(torch.int32)


def tiled_codes(codes: Tensor) -> Tensor:
    """int32 `[bits, N, words]` -> `[row tiles, K units, bits, 512]`, padded with zeros."""
    bits, n, words = codes.shape
    padded = torch.nn.functional.pad(folded_codes(codes), (0, -words % UNIT_WORDS, 0, -n % TILE_ROWS))
    split = padded.view(bits, -1, 4, 4, padded.shape[2] // UNIT_WORDS, UNIT_WORDS)  # bits, tile, quad, row, unit, word
    return split.permute(1, 4, 0, 2, 5, 3).flatten(3).contiguous()


def unit_groups(in_features: int, group_size: int) -> tuple[list[int], int]:
    """(the first group of each unit of inputs, the most groups that a unit touches)."""
    starts = range(0, in_features, UNIT_INPUTS)
    first = [start // group_size for start in starts]
    last = [(min(start + UNIT_INPUTS, in_features) - 1) // group_size for start in starts]
    return first, max(end - begin + 1 for begin, end in zip(first, last, strict=True))


def tiled_scales(terms: Tensor, in_features: int, group_size: int) -> Tensor:
    """`[terms, N, G]` -> `[row tiles, K units, terms, 4 quads, slots, 4 rows]`, padded with zeros."""
    first, slots = unit_groups(in_features, group_size)
    groups = torch.tensor(first, device=terms.device)[:, None] + torch.arange(slots, device=terms.device)
    padded = torch.nn.functional.pad(terms, (0, slots, 0, -terms.shape[1] % TILE_ROWS))
    split = padded[:, :, groups].unflatten(1, (-1, 4, 4))  # terms, tile, quad, row, unit, slot
    return split.permute(1, 4, 0, 2, 5, 3).contiguous()


def narrowed(terms: Tensor, shifted: int) -> tuple[Tensor, float] | None:
    """fp32 terms -> (fp16 terms, unit) where that is exact, else None. The first `shifted` are divided by the unit."""
    largest = float(terms[:shifted].abs().max())
    for exponent in (0, LARGEST_EXPONENT - math.frexp(largest)[1]):
        if abs(exponent) <= 100:
            wide = torch.cat((terms[:shifted] * 2.0**exponent, terms[shifted:]))
            narrow = wide.to(torch.float16)
            if bool((narrow.to(torch.float32) == wide).all()):
                return narrow, 2.0**-exponent
    return None


def _terms(record: BcqRecord) -> tuple[Tensor, float]:
    """(scales and offsets as kernels take them `[terms, N, G]`, unit)."""
    if record.zeros is not None:
        center = 2 * uniform_center(record.zeros, record.bits)
        found = narrowed(torch.stack((record.scales[0].to(torch.float32) / 2, center)), 1)
        if found is not None:
            return found
    terms, offsets = record.plane_scales().to(torch.float32), record.plane_offsets()
    if offsets is not None:
        terms = torch.cat((terms, offsets[None].to(torch.float32)))
    return (terms, 1.0) if record.zeros is not None else narrowed(terms, len(terms)) or (terms, 1.0)


def layout(record: BcqRecord) -> tuple[Tensor, ...]:
    """(codes, scales, unit) of this module's docstring."""
    terms, unit = _terms(record)
    scales = tiled_scales(terms, record.in_features, record.group_size)
    return tiled_codes(record.codes), scales, torch.full((1,), unit, dtype=torch.float32, device=scales.device)


def _runner(operator: str) -> Callable[[Ops, Tensor, BcqRecord, Tensor | None, int], Tensor]:
    def run(ops: Ops, x: Tensor, record: BcqRecord, bias: Tensor | None, accuracy: int) -> Tensor:
        codes, scales, unit = kept_layout(record, "cuda lut", lambda: layout(record))
        uniform = record.scale_kind == "uniform" and scales.dtype == torch.float16
        shape = (record.out_features, record.group_size, uniform)
        return ops(operator)(x, codes, scales, unit, bias, *shape, accuracy)

    return run


ALGORITHMS = (
    Algorithm("bcq_linear", "lut_gemm", _runner("_bcq_lut_gemm_cuda")),
    Algorithm("bcq_linear", "biqgemm", _runner("_bcq_biqgemm_cuda")),
)
