"""What the operators of `launch.py` share: how a kernel is started, workspaces, tiles.

Multiplications and additions may be fused (`enable_fp_fusion=True`, stated because Triton's default is to change): that
only takes roundings away from sums. In the decoding of W no product is added to anything: its bits are SPEC.md's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import triton
from triton import JITFunction

from .config import power_of_two
from .interpreted import mend
from .reduce import reduce_kernel

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
LANES_ALONG_FIRST = VERSION < (3, 7)
"""Along which dimension Triton lays the lanes of a gather by computed addresses: the first one, later the last one.
`codegemm` needs it to be N, or else sums over a chunk cross lanes: three times the instructions."""

REDUCE_BLOCK = 1024
DEQUANTIZE_WIDTH = 512
"""Elements of a row in a tile of `dequantize`, at most."""

PANEL_BYTES = 32 << 20
"""Most bytes of dequantized weight at a time: less than the L2 cache of an H100, where the matmul then finds it."""

INTERPRETED = not isinstance(reduce_kernel, JITFunction)
if INTERPRETED:
    mend()
PSUMBOOK_TILE, DEQUANTIZE_TILE = (1 << 18, 1 << 16) if INTERPRETED else (2048, 4096)
"""Elements of a tile: 16 and 32 a thread. The interpreter is faster with few large ones."""


class _Fusing:
    """A kernel whose multiplications and additions the compiler may fuse, whatever its Triton's default is."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self.kernel[grid], enable_fp_fusion=True)


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton`, and what eager calls ask of the compiler; traced ones have Triton's defaults.

    Not every torch lets it take an interpreted kernel.
    """
    if INTERPRETED:
        return kernel
    wrapped = torch.library.wrap_triton(kernel)
    return _Fusing(kernel) if wrapped is kernel else wrapped


def new_out(x: Tensor, rows: int, parts: int) -> Tensor:
    """Where a kernel writes: y itself, or a workspace of fp32 parts of it."""
    if parts == 1:
        return x.new_empty(x.shape[0], rows)
    return x.new_empty(parts, x.shape[0], rows, dtype=torch.float32)


def without_ratios(
    scales: Tensor, offsets: Tensor | None, ratios: Tensor | None, scale_kind: str
) -> tuple[Tensor, Tensor | None, str]:
    """Scales, offsets and scale kind of a weight to be decoded: the ratio kind in its free form, fp32.

    SPEC.md has `scales * ratios` rounded before it is added; a kernel that multiplied would have both fused.
    """
    if ratios is None:
        return scales, offsets, scale_kind
    wide = None if offsets is None else offsets.to(torch.float32)
    return scales.to(torch.float32) * ratios.view(-1, 1, 1), wide, "free"


def dequantize_tile(w: Tensor, unit: int, units: int) -> tuple[int, int]:
    """(rows, units) of a tile."""
    wide = DEQUANTIZE_TILE if INTERPRETED else DEQUANTIZE_WIDTH
    block_u = min(wide // unit, power_of_two(units))
    return max(1, min(DEQUANTIZE_TILE // (block_u * unit), power_of_two(w.shape[0]))), block_u


def sum_parts(x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    """The second kernel, where there are parts."""
    if out.ndim == 2:
        return out
    y = x.new_empty(out.shape[1:])
    grid = (-(-y.numel() // REDUCE_BLOCK),)
    wrap_triton(reduce_kernel)[grid](
        out, out if bias is None else bias, y, y.numel(), y.shape[1], out.shape[0],
        HAS_BIAS=bias is not None, BLOCK=REDUCE_BLOCK, num_warps=4,
    )  # fmt: skip
    return y


def by_panels(x: Tensor, out_features: int, bias: Tensor | None, fill: Callable[[Tensor, int], None]) -> Tensor:
    """x `[M, K]` times W, made panel by panel. fill(w, begin) puts W's rows from begin on into w, of x's dtype."""
    k = x.shape[1]
    panel = max(1, PANEL_BYTES // (k * x.element_size()))

    def part(begin: int, rows: int) -> Tensor:
        w = x.new_empty(rows, k)
        fill(w, begin)
        return torch.nn.functional.linear(x, w, None if bias is None else bias.narrow(0, begin, rows))

    with torch.autocast(x.device.type, enabled=False):
        if panel >= out_features:
            return part(0, out_features)
        y = x.new_empty(x.shape[0], out_features)
        for begin in range(0, out_features, panel):
            rows = min(panel, out_features - begin)
            y.narrow(1, begin, rows).copy_(part(begin, rows))
    return y
