"""The error of a quantized weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..formats import QuantizedWeight
from .slabs import check_weight, one_thread, read, slabs


def weight_error(weight: Tensor, q: QuantizedWeight, importance: Tensor | None = None) -> tuple[float, float]:
    """(sum of squared error, sum of squared weight) of `weight` `[N, K]` against `q.dequantize()`.

    Both are summed in fp64, slab by slab; importance `[K]` weights the columns of both. Raises `ArgumentError` when the
    shapes differ, or the weight holds NaN or Inf.
    """
    n, k = check_weight(weight)
    if q.shape != (n, k):
        raise ArgumentError(f"weight is {n}x{k}, but the quantized weight is {q.shape[0]}x{q.shape[1]}")
    columns = None if importance is None else importance.to(weight.device, torch.float64)
    error = energy = 0.0
    with one_thread(weight.device):
        for rows in slabs(n, k):
            exact = read(weight, rows).to(torch.float64)
            difference = exact - q.dequantize(torch.float32, rows).to(exact)
            for_sum = (difference.square(), exact.square())
            if columns is not None:
                for_sum = (for_sum[0] * columns, for_sum[1] * columns)
            error += float(for_sum[0].sum())
            energy += float(for_sum[1].sum())
    return error, energy
