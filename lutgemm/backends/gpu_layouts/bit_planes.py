"""BCQ on tensor cores, two kernels of one layout.

`bit_planes` (`csrc/cuda/bit_planes.cuh`), few tokens: exact integer sums of codes and activations, which are rounded to
steps of max |x| / 32258 of each 128 columns. `dequant_gemm` (`csrc/cuda/dequant_gemm.cu`, on Hopper `wgmma_gemm.cu`),
more tokens: W and x in fp16, scaled by powers of two per row and token, sums in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...accuracy import ACCURACIES
from ...formats.base import num_groups
from .. import Problem
from . import Algorithm, BcqRecord, Ops, kept_layout

TILE_ROWS = 16
CHUNK = 128
MOST_ACCURATE = ACCURACIES.index("accurate")


def steps_of(record: BcqRecord) -> int:
    """Groups, or equal parts of groups, in a chunk: the fewest of 1, 2, 4 such that none holds two groups."""
    size = record.group_size
    return next(s for s in (1, 2, 4) if size >= record.in_features or size % (CHUNK // s) == 0)


def _interleaved(words: Tensor) -> Tensor:
    """int32 `[..., 4]`, 128 columns in order -> `[..., 4]`: word t, bit 8i + 2j + h is column 32j + 16h + 4t + i."""
    parts = []
    for t in range(4):
        word = torch.zeros_like(words[..., 0])
        for p in range(8):
            four = (words[..., p // 2] >> (16 * (p % 2) + 4 * t)) & 0xF
            word |= ((four * 0x204081) & 0x01010101) << p  # bit i of the four to bit 8i
        parts.append(word)
    return torch.stack(parts, -1)


def _fields(planes: list[Tensor]) -> list[Tensor]:
    """1, 2, 4 or 8 interleaved planes, the highest bit first -> as many words of fields of that many bits.

    Word w, byte i, bits width * (p % (8 / width)) .. hold the field of bit 8i + p, p = 8 / width * w ...
    """
    width = len(planes)
    per_word = 8 // width
    words = []
    for w in range(width):
        word = torch.zeros_like(planes[0])
        for place, plane in enumerate(reversed(planes)):
            for u in range(per_word):
                bit = (plane >> (w * per_word + u)) & 0x01010101
                word |= bit << (width * u + place)
        words.append(word)
    return words


def _merged(planes: Tensor) -> Tensor:
    """Interleaved planes `[bits, ...]` -> words of fields `[bits, ...]`: 8, 4, 2, 1 bits, the high bits first."""
    found: list[Tensor] = []
    rest = list(planes)
    for width in (8, 4, 2, 1):
        if len(rest) & width:
            found += _fields(rest[:width])
            rest = rest[width:]
    return torch.stack(found)


def wide(record: BcqRecord) -> bool:
    """Whether the layout's scales are fp32: where the record's, or its zeros, are not all exact in fp16."""
    narrow_zeros = record.zeros is None or record.zeros.dtype in (torch.uint8, torch.float16)
    return record.scales.dtype != torch.float16 or record.ratios is not None or not narrow_zeros


def _slots(record: BcqRecord) -> Tensor:
    """`[slots, N, G]`, fp16 or (`wide`) fp32: a scale for each plane and the offset; uniform: s and the zero."""
    dtype = torch.float32 if wide(record) else torch.float16
    if record.zeros is not None:
        return torch.stack([record.scales[0].to(dtype), record.zeros.to(dtype)])
    scales, offsets = record.plane_scales(), record.plane_offsets()
    return (scales if offsets is None else torch.cat([scales, offsets.unsqueeze(0)])).to(dtype)


HALF_RANGE = 8
"""`dequant_gemm` is told of the power of two that brings the largest |W| of a row to 2**7 .. 2**8."""


def _row_scales(record: BcqRecord, rows: int) -> Tensor:
    """fp32 `[rows]`, powers of two: the largest |W| of a row over it is about 2**8; 1 for rows past N."""
    if record.zeros is not None:
        zeros = record.zeros.to(torch.float32)
        largest = record.scales[0].to(torch.float32).abs() * torch.maximum(zeros.abs(), 2**record.bits - 1 - zeros)
    else:
        largest = record.plane_scales().to(torch.float32).abs().sum(0)
        if (offsets := record.plane_offsets()) is not None:
            largest = largest + offsets.to(torch.float32).abs()
    exponent = torch.frexp(largest.amax(1)).exponent - HALF_RANGE
    scales = torch.ldexp(torch.ones_like(largest[:, 0]), exponent.clamp(-100, 100))
    return pad(scales, (0, rows - len(scales)), value=1.0)


def _ones(words: Tensor) -> Tensor:
    """int32 -> how many bits of each are set."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    return (eights * 0x01010101) >> 24


def _row_sums(record: BcqRecord, rows: int) -> Tensor:
    """fp32 `[rows]`: the sums of the elements of each row of W; 0 for rows past N."""
    k, n, groups = record.in_features, record.out_features, num_groups(record.in_features, record.group_size)
    words = record.group_size // 32 if groups > 1 else record.codes.shape[2]
    first = torch.arange(groups, device=record.codes.device) * record.group_size
    columns = (k - first).clamp(max=record.group_size).to(torch.float64)
    offsets = record.plane_offsets()
    sums = torch.zeros_like(columns) if offsets is None else offsets.to(torch.float64) * columns
    for plane, scales in zip(record.codes, record.plane_scales(), strict=True):
        ones = pad(_ones(plane), (0, groups * words - plane.shape[1])).view(n, groups, words).sum(2)
        sums = sums + scales.to(torch.float64) * (2 * ones - columns)
    return pad(sums.sum(1).to(torch.float32), (0, rows - n))


def layout(record: BcqRecord) -> tuple[Tensor, Tensor]:
    """packed int32 `[ceil(N/16), ceil(K/128), unit]`, and fp32 `[2, rows]`: `_row_scales` and `_row_sums`.

    A unit is what bit_planes.cuh draws.
    """
    bits, n, k = record.bits, record.out_features, record.in_features
    tiles, chunks, steps = -(-n // TILE_ROWS), -(-k // CHUNK), steps_of(record)
    words = pad(record.codes, (0, chunks * 4 - record.codes.shape[2], 0, tiles * TILE_ROWS - n))
    planes = _interleaved(words.view(bits, tiles * TILE_ROWS, chunks, 4))
    if record.zeros is not None:
        planes = _merged(planes)
    # [bits, tile, row / 8, row % 8 = g, chunk, t] -> [tile, chunk, bits, g, t, row / 8]
    codes = planes.view(bits, tiles, 2, 8, chunks, 4).permute(1, 4, 0, 3, 5, 2).reshape(tiles, chunks, -1)

    slots = _slots(record)
    first_column = torch.arange(chunks * steps, device=slots.device) * (CHUNK // steps)
    group = (first_column // record.group_size).clamp(max=num_groups(k, record.group_size) - 1)
    spread = pad(slots, (0, 0, 0, tiles * TILE_ROWS - n))[:, :, group]
    # [slot, tile, row / 8, g, chunk, step] -> [tile, chunk, step, slot, g, row / 8]
    ordered = spread.view(-1, tiles, 2, 8, chunks, steps).permute(1, 4, 5, 0, 3, 2).reshape(tiles, chunks, -1)
    packed = torch.cat([codes, ordered.contiguous().view(torch.int32)], 2)
    return packed, torch.stack([of(record, tiles * TILE_ROWS) for of in (_row_scales, _row_sums)])


def _made(record: BcqRecord) -> tuple[Tensor, ...]:
    return kept_layout(record, "cuda planes", lambda: layout(record))


def _described(record: BcqRecord) -> tuple[int | bool, ...]:
    """What the operators are told of a layout: N, K, bits, merged, wide, has_offsets, steps."""
    shape = (record.out_features, record.in_features, record.bits)
    return (*shape, record.zeros is not None, wide(record), record.offsets is not None, steps_of(record))


def _bit_planes(ops: Ops, x: Tensor, record: BcqRecord, bias: Tensor | None, accuracy: int) -> Tensor:
    packed, _ = _made(record)
    return ops("_bcq_bit_planes_cuda")(x, packed, bias, *_described(record))


def _dequant_gemm(ops: Ops, x: Tensor, record: BcqRecord, bias: Tensor | None, accuracy: int) -> Tensor:
    packed, row_facts = _made(record)
    return ops("_bcq_dequant_gemm_cuda")(x, packed, row_facts, bias, *_described(record))


def _unsupported(problem: Problem) -> str | None:
    if problem.accuracy > MOST_ACCURATE:
        return f"it rounds activations or weights by more than {ACCURACIES[problem.accuracy]!r} allows"
    return None


ALGORITHMS = (
    Algorithm("bcq_linear", "bit_planes", _bit_planes, _unsupported),
    Algorithm("bcq_linear", "dequant_gemm", _dequant_gemm, _unsupported),
)
