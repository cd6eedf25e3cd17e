"""The error that `csrc/cpu/byte_kernels.h` derives for kernels of integer tables."""

from __future__ import annotations

import torch
from torch import Tensor

from lutgemm.formats import BCQWeight


def look_up_width(isa: str, algorithm: str, accuracy: str) -> int:
    """k of a look-up."""
    if isa.startswith("avx512") and algorithm == "biqgemm" and accuracy != "near-exact":
        return 6
    if isa == "avx512" and accuracy == "accurate":
        return 6
    return 8 if isa == "avx512vbmi" else 4


def per_span_bound(x: Tensor, w: BCQWeight, width: int, accuracy: str) -> Tensor:
    """|error| of y `[M, N]`, fp64: look-ups * step / 2 of every span, times the sum of its |scales|.

    width: k of a look-up. The rounding of fp32 sums comes on top.
    """
    group, total = min(w.group_size, w.shape[1]), torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    scales = w.plane_scales().double().abs().sum(0)
    rounded = 0.0 if width == 8 else 0.5
    for start in range(0, w.shape[1], group):
        for first in range(start, min(start + group, w.shape[1]), 128):
            part = x[:, first : min(first + 128, start + group)].double().abs()
            slices = -(-part.shape[1] // 8)
            words = slices // 3 * 4 + (slices % 3 + 1 if slices % 3 else 0)
            look_ups = {8: slices, 6: words, 4: 2 * slices}[width]
            padded = torch.nn.functional.pad(part, (0, look_ups * width - part.shape[1]))
            largest = padded.view(len(x), look_ups, width).sum(-1).amax(-1)
            steps = {
                "fast": largest / (128 - rounded - 1 / 16),
                "accurate": padded.sum(-1) / (32767 - look_ups),
                "near-exact": largest / (32768 - rounded - 1 / 16),
            }
            step = steps["accurate" if width == 6 else accuracy]
            total += (look_ups * step / 2)[:, None] * scales[:, start // group]
    return total
