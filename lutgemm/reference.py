"""The truth, and the three algorithms written out literally in plain torch. Slow on purpose; any device.

    y[M, N] = x[M, K] @ W[N, K].T        (bias is added by the caller)

`exact_linear` is fp64 dequantize-and-matmul. `lut_gemm`, `biqgemm` and `codegemm` build the tables of their papers and
gather from them; sums are fp32.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .formats import BCQWeight, CodebookWeight, QuantizedWeight
from .formats.base import num_groups

LUT_WIDTH = 8
"""Activations per table slice (mu in LUT-GEMM): one byte of codes indexes one table of 256."""


def exact_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """fp64 `[M, N]`: x and the fp32-dequantized weight multiplied in fp64."""
    return x.to(torch.float64) @ weight.dequantize(torch.float32).to(torch.float64).T


def signed_sums(x: Tensor) -> Tensor:
    """x `[M, K]` -> fp32 tables `[M, ceil(K/8), 256]`: entry e of slice j sums `sign(e, i) * x[8*j + i]` over i.

    LUT-GEMM (ICLR 2024), section 3.1, figure 2. K is padded with zeros.
    """
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, -x.shape[1] % LUT_WIDTH))
    entries = torch.arange(2**LUT_WIDTH, device=x.device)
    signs = ((entries[:, None] >> torch.arange(LUT_WIDTH, device=x.device)) & 1).to(torch.float32) * 2 - 1
    return padded.unflatten(1, (-1, LUT_WIDTH)) @ signs.T


def _octets(codes: Tensor, num_slices: int) -> Tensor:
    """codes int32 `[bits, N, ceil(K/32)]` -> table indices `[bits, N, num_slices]`: the byte of each slice of 8."""
    return codes.contiguous().view(torch.uint8)[..., :num_slices].long()


def _slices_of_groups(in_features: int, group_size: int) -> list[slice]:
    """Table slices of each group. Group bounds are multiples of 32 (or the end of the row), so no slice spans two."""
    edges = [min(g * group_size, in_features) for g in range(num_groups(in_features, group_size) + 1)]
    return [slice(a // LUT_WIDTH, -(-b // LUT_WIDTH)) for a, b in pairwise(edges)]


def _group_offsets(x: Tensor, weight: BCQWeight) -> Tensor:
    """fp32 `[M, N]`: sum over groups of offsets[n, g] * sum of x over the group."""
    offsets = weight.plane_offsets()
    if offsets is None:
        return torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    size = min(weight.group_size, x.shape[1])
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, -x.shape[1] % size))
    sums = padded.unflatten(1, (-1, size)).sum(-1)
    return sums @ offsets.to(torch.float32).T


def lut_gemm(x: Tensor, weight: BCQWeight) -> Tensor:
    """LUT-GEMM (ICLR 2024), section 3: one token at a time, a table of 256 per 8 activations, gathered by code bytes.

    x `[M, K]` -> fp32 `[M, N]`.
    """
    y = _group_offsets(x, weight)
    scales = weight.plane_scales().to(torch.float32)
    for m in range(x.shape[0]):
        table = signed_sums(x[m : m + 1])[0]
        octets = _octets(weight.codes, len(table))
        for g, span in enumerate(_slices_of_groups(x.shape[1], weight.group_size)):
            index = octets[:, :, span]
            slices = torch.arange(span.start, span.stop, device=x.device)
            for b in range(weight.bits):
                y[m] += scales[b, :, g] * table[slices, index[b]].sum(-1)
    return y


def biqgemm(x: Tensor, weight: BCQWeight) -> Tensor:
    """BiQGEMM (SC 2020): the table of one slice is kept while all rows and planes of W and all tokens read from it.

    x `[M, K]` -> fp32 `[M, N]`.
    """
    y = _group_offsets(x, weight)
    scales = weight.plane_scales().to(torch.float32)
    tables = signed_sums(x)
    octets = _octets(weight.codes, tables.shape[1])
    for g, span in enumerate(_slices_of_groups(x.shape[1], weight.group_size)):
        partial = torch.zeros(weight.bits, x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
        for j in range(span.start, span.stop):
            stationary = tables[:, j]
            for b in range(weight.bits):
                partial[b] += stationary[:, octets[b, :, j]]
        for b in range(weight.bits):
            y += scales[b, :, g] * partial[b]
    return y


def codegemm(x: Tensor, weight: CodebookWeight) -> Tensor:
    """CodeGEMM (NeurIPS 2025), section 3: the Psumbook holds every inner product of a slice of x with every centroid.

    x `[M, K]` -> fp32 `[M, N]`.
    """
    m, n, k = x.shape[0], weight.shape[0], x.shape[1]
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, -k % weight.vec_len))
    slices = padded.unflatten(1, (-1, weight.vec_len))
    psumbook = torch.einsum("mjv,cev->mcje", slices, weight.codebooks.to(torch.float32))
    y = torch.zeros(m, n, dtype=torch.float32, device=x.device)
    for g in range(weight.layout.num_groups):
        start, stop = g * weight.group_size, min(k, (g + 1) * weight.group_size)
        span = torch.arange(start // weight.vec_len, -(-stop // weight.vec_len), device=x.device)
        partial = torch.zeros(m, n, dtype=torch.float32, device=x.device)
        for c in range(weight.layout.num_codebooks):
            partial += psumbook[:, c, span, weight.codes[c, :, span].long()].sum(-1)
        y += weight.scales[:, g].to(torch.float32) * partial
    return y


def dequantize(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Dequantize-and-matmul in x's own dtype: what a GPU or a BLAS does best at large M. x `[M, K]` -> `[M, N]`."""
    return x @ weight.dequantize(x.dtype).T
