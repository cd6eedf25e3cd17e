"""The second kernel of a split K: parts of y summed in their order, so that every run gives the same bits.

    y[m, n] = sum over s = 0, 1, .. of parts[s, m, n] + bias[n]

    parts  | split 0 | split 1 | ..        each [M * N], fp32
              | BLOCK elements a program, all splits of them
    y      |  v

Grid: (blocks of M * N).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reduce_kernel(parts_ptr, bias_ptr, y_ptr, MN, N, num_parts, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < MN
    total = tl.load(parts_ptr + at, mask=mask, other=0.0)
    for part in range(1, num_parts):
        total += tl.load(parts_ptr + part * tl.cast(MN, tl.int64) + at, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)
