"""The uniform kind of BCQ: an integer grid `s * (q - zero)`, fitted by clip search and alternating least squares.

Shapes: groups `[R, S]` fp32; q fp32 `[R, S]` of whole numbers in 0 .. 2**bits - 1; s, zero fp32 `[R]`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .levels import GAIN
from .slabs import Stored

CLIPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6, 0.54, 0.48, 0.42, 0.36)
"""Shares of the range of a group that clip search tries."""

MAX_ROUNDS = 8
"""Alternating rounds of `best_grid`: few gain anything after six."""

MAX_ZERO = 255
"""Zeros are stored as uint8, and may lie outside the codes."""


class Grid(NamedTuple):
    """An integer grid a group, as stored: `s * (q - zero)`."""

    scale: Tensor
    zero: Tensor

    def codes(self, groups: Tensor, bits: int) -> Tensor:
        """q `[R, S]`: the nearest of the grid, round half to even; zero, clamped, for a scale of 0."""
        divisor = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)[:, None]
        return (groups / divisor).round_().add_(self.zero[:, None]).clamp_(0, 2**bits - 1)

    def error(self, groups: Tensor, importance: Tensor | None, q: Tensor) -> Tensor:
        """`[R]`: weighted squared error; Inf where the grid is not finite."""
        return squared_error(groups - self.scale[:, None] * (q - self.zero[:, None]), importance)


def squared_error(difference: Tensor, importance: Tensor | None) -> Tensor:
    """`[R, S]` -> `[R]`, weighted; Inf in place of NaN."""
    square = difference.square_()
    total = (square if importance is None else square.mul_(importance)).sum(-1)
    return torch.where(torch.isfinite(total), total, torch.inf)


def rtn_grid(groups: Tensor, bits: int, stored: Stored) -> Grid:
    """Plain asymmetric round-to-nearest: the range is min .. max of the group and 0, s = range / (2**bits - 1) as
    stored, zero = round(-min / s). A scale too small for its dtype becomes the smallest number the dtype has."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    return _range_grid(low, high, bits, stored, 2**bits - 1)


def _range_grid(low: Tensor, high: Tensor, bits: int, stored: Stored, max_zero: int) -> Grid:
    width = high - low
    scale = stored(width / (2**bits - 1))
    scale = torch.where((scale == 0) & (width > 0), stored.smallest, scale)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    return Grid(scale, (-low / divisor).round().clamp(0, max_zero))


class _Best:
    """The best grid of each group so far."""

    def __init__(self, groups: Tensor, importance: Tensor | None, bits: int, first: Grid) -> None:
        self.groups, self.importance, self.bits = groups, importance, bits
        self.grid = Grid(first.scale.clone(), first.zero.clone())
        self.error = first.error(groups, importance, first.codes(groups, bits))

    def offer(self, grid: Grid, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take `grid` where it is better, among the groups `[R]` if given. Returns (its codes, where it was taken)."""
        q = grid.codes(self.groups, self.bits)
        error = grid.error(self.groups, self.importance, q)
        better = error < self.error * GAIN
        if among is not None:
            better &= among
        self.error = torch.where(better, error, self.error)
        self.grid = Grid(*(torch.where(better, new, old) for new, old in zip(grid, self.grid, strict=True)))
        return q, better


def clip_search(groups: Tensor, importance: Tensor | None, bits: int, stored: Stored) -> Grid:
    """Round-to-nearest of the range shrunk by each of `CLIPS`: the one of least weighted squared error."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best = _Best(groups, importance, bits, _range_grid(low, high, bits, stored, 2**bits - 1))
    for clip in CLIPS[1:]:
        best.offer(_range_grid(low * clip, high * clip, bits, stored, 2**bits - 1))
    return best.grid


def _refit(groups: Tensor, importance: Tensor | None, q: Tensor, stored: Stored) -> Grid:
    """Least squares of (s, zero) for fixed q: the line through (q, w), its zero rounded, then s alone for that zero."""
    weights = torch.ones((), dtype=torch.float32, device=groups.device) if importance is None else importance
    mass = (weights * torch.ones_like(q)).sum(-1)
    mean_q, mean_w = (weights * q).sum(-1) / mass, (weights * groups).sum(-1) / mass
    centered = weights * (q - mean_q[:, None])
    spread = (centered * q).sum(-1)
    slope = (centered * groups).sum(-1) / spread.clamp(min=1e-30)
    safe = torch.where(slope == 0, torch.ones_like(slope), slope)
    return _rescale(groups, importance, q, (mean_q - mean_w / safe).round().clamp(0, MAX_ZERO), stored)


def _rescale(groups: Tensor, importance: Tensor | None, q: Tensor, zero: Tensor, stored: Stored) -> Grid:
    """The least-squares s for fixed q and zero."""
    place = q - zero[:, None]
    weighted = place if importance is None else place * importance
    return Grid(stored((weighted * groups).sum(-1) / (weighted * place).sum(-1).clamp(min=1e-30)), zero)


def best_grid(groups: Tensor, importance: Tensor | None, bits: int, stored: Stored, iters: int) -> Grid:
    """The best grid found, never above `rtn_grid` in error.

    Clip search, then up to min(iters, `MAX_ROUNDS`) rounds of nearest codes and least-squares (s, zero), then the
    neighbouring zeros with their own least-squares s. A group on one side of 0 is fitted over its own range, with zero
    beyond the codes; a positive one negated, with a negative s.
    """
    best = _Best(groups, importance, bits, rtn_grid(groups, bits, stored))
    sign = torch.where(groups.amin(-1) > 0, -1.0, torch.ones_like(groups[:, 0]))
    groups = groups * sign[:, None]
    low, high = groups.amin(-1), groups.amax(-1)
    own = _Best(groups, importance, bits, _range_grid(low, high, bits, stored, MAX_ZERO))
    for clip in CLIPS[1:]:
        own.offer(_range_grid(low * clip, high * clip, bits, stored, MAX_ZERO))
    q = own.grid.codes(groups, bits)
    active = torch.ones_like(low, dtype=torch.bool)
    for _ in range(min(iters, MAX_ROUNDS)):
        q, active = own.offer(_refit(groups, importance, q, stored), active)
        if not active.any():
            break
    for step in (-1, 1) if iters else ():
        zero = (own.grid.zero + step).clamp(0, MAX_ZERO)
        q = Grid(own.grid.scale, zero).codes(groups, bits)
        for _ in range(2):
            q, _ = own.offer(_rescale(groups, importance, q, zero, stored))
    best.offer(Grid(own.grid.scale * sign, own.grid.zero), torch.isfinite(best.grid.scale))
    return best.grid
