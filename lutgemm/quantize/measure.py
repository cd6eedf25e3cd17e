"""The error of a quantized weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..formats import QuantizedWeight
from .slabs import Weight, check_weight, full_precision, one_thread, read, slabs


def weight_error(weight: Weight, q: QuantizedWeight, importance: Tensor | None = None) -> tuple[float, float]:
    """(sum of squared error, sum of squared weight) of `weight` `[N, K]` against `q.dequantize()`.

    Both are summed in fp64, row by row; importance `[K]` weights the columns of both. Raises `ArgumentError` when the
    shapes differ, or the weight holds NaN or Inf.
    """
    n, k = check_weight(weight)
    if q.shape != (n, k):
        raise ArgumentError(f"weight is {n}x{k}, but the quantized weight is {q.shape[0]}x{q.shape[1]}")
    columns = None if importance is None else importance.to(weight.device, torch.float64)
    # Filled in, not gathered: small tensors kept from each slab would lie between the large ones of the next.
    sums = torch.empty(2, n, dtype=torch.float64, device=weight.device)
    with one_thread(weight.device), full_precision(weight.device):
        for rows in slabs(n, k):
            exact = read(weight, rows).to(torch.float64)
            difference = exact - q.dequantize(torch.float32, rows).to(exact)
            for own, values in zip(sums, (difference, exact), strict=True):
                square = values.square_()
                own[rows] = (square if columns is None else square.mul_(columns)).sum(-1)
        error, energy = sums.sum(-1).tolist()
    return error, energy
