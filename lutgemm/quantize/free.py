"""The free kind of BCQ, method by method: each returns the stored coeffs of the groups and their codes.

Shapes as in `levels`: groups `[R, S]`, coeffs `[bits + 1, R]` (the offset last), codes int64 `[R, S]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.bcq import uniform_plane_weights
from .levels import GAIN, SortedGroups, alternate, code_sums, level_table, nearest_codes, refit
from .slabs import Stored
from .uniform import CLIPS, rtn_grid, squared_error


def fit_free(
    groups: Tensor, importance: Tensor | None, bits: int, method: str, offsets: bool, iters: int, stored: Stored
) -> tuple[Tensor, Tensor]:
    """(coeffs as stored, codes) of the named method (`BCQConfig.method`)."""
    if method == "rtn":
        return _rtn(groups, bits, offsets, stored)
    if method == "rtn_clip":
        coeffs = stored(_clipped(groups, importance, bits, offsets))
        return coeffs, nearest_codes(groups, level_table(coeffs))
    if method in ("greedy", "refined"):
        return _greedy(groups, importance, bits, offsets, stored, method == "refined")
    if method == "alternating":
        start, _ = _greedy(groups, importance, bits, offsets, stored, refine=False)
        coeffs, _ = alternate(SortedGroups(groups, importance), start, offsets, iters, stored)
    else:
        coeffs = _best(groups, importance, bits, offsets, iters, stored)
    return coeffs, nearest_codes(groups, level_table(coeffs))


def _plane_scales(scale: Tensor, bits: int) -> list[Tensor]:
    """The plane scales of an integer grid of step `scale` `[R]`."""
    return [scale * weight for weight in uniform_plane_weights(bits)]


def _rtn(groups: Tensor, bits: int, offsets: bool, stored: Stored) -> tuple[Tensor, Tensor]:
    """Plain round-to-nearest written with free scales: the grid of `rtn_grid`, or without offsets the symmetric one
    whose outermost levels are plus and minus the largest weight."""
    if not offsets:
        step = 2 * groups.abs().amax(-1) / (2**bits - 1)
        coeffs = stored(torch.stack([*_plane_scales(step, bits), torch.zeros_like(step)]))
        return coeffs, nearest_codes(groups, level_table(coeffs))
    grid = rtn_grid(groups, bits, stored)
    offset = grid.scale * ((2**bits - 1) / 2 - grid.zero)
    coeffs = stored(torch.stack([*_plane_scales(grid.scale, bits), offset]))
    return coeffs, grid.codes(groups, bits).long()


def _clipped(groups: Tensor, importance: Tensor | None, bits: int, offsets: bool) -> Tensor:
    """Evenly spaced levels over the range shrunk by the best of `CLIPS` (squared error); not rounded.

    With offsets each range is also tried shifted so that 0 is a level, which pays where most weights are small.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    if not offsets:
        high = torch.maximum(high.abs(), low.abs())
        low = -high
    best_base, best_step = torch.zeros_like(low), torch.zeros_like(low)
    best_error = torch.full_like(low, torch.inf)
    for clip in CLIPS:
        step = (high - low) * clip / (2**bits - 1)
        divisor = torch.where(step == 0, torch.ones_like(step), step)
        bases = (low * clip, (low * clip / divisor).round() * step) if offsets else (low * clip,)
        for base in bases:
            q = ((groups - base[:, None]) / divisor[:, None]).round_().clamp_(0, 2**bits - 1)
            error = squared_error(groups - base[:, None] - q * step[:, None], importance)
            better = error < best_error * GAIN
            best_base, best_step = torch.where(better, base, best_base), torch.where(better, step, best_step)
            best_error = torch.where(better, error, best_error)
    offset = best_base + best_step * ((2**bits - 1) / 2) if offsets else torch.zeros_like(low)
    return torch.stack([*_plane_scales(best_step, bits), offset])


def _best(groups: Tensor, importance: Tensor | None, bits: int, offsets: bool, iters: int, stored: Stored) -> Tensor:
    """Alternating from the clipped levels and from refined greedy; where round-to-nearest is as good, that.

    Even levels are the better start for bell-shaped groups, greedy ones for groups with far outliers.
    """
    data = SortedGroups(groups, importance)
    best, _ = _rtn(groups, bits, offsets, stored)
    _, _, best_error = data.nearest(level_table(best))
    overflow = ~torch.isfinite(best).all(0)
    greedy, _ = _greedy(groups, importance, bits, offsets, stored, refine=True)
    for start in (_clipped(groups, importance, bits, offsets), greedy):
        coeffs, error = alternate(data, start, offsets, iters, stored)
        better = (error < best_error * GAIN) & ~overflow
        best, best_error = torch.where(better, coeffs, best), torch.where(better, error, best_error)
    return best


def _greedy(
    groups: Tensor, importance: Tensor | None, bits: int, offsets: bool, stored: Stored, refine: bool
) -> tuple[Tensor, Tensor]:
    """Plane after plane: b = sign(residual), scale = mean |residual|; `refine` refits all scales after each plane.

    Greedy approximation (Guo et al., CVPR 2017) and refined greedy, as compared in alternating multi-bit quantization
    (Xu et al., ICLR 2018). With offsets the residual starts from the mean.
    """
    weights = torch.ones_like(groups) if importance is None else importance
    mass = weights.sum(-1)
    offset = (weights * groups).sum(-1) / mass if offsets else torch.zeros_like(mass)
    coeffs, codes = offset[None], torch.zeros_like(groups, dtype=torch.int64)
    for _ in range(bits):
        residual = groups - level_table(coeffs).gather(1, codes)
        scale = (weights * residual.abs()).sum(-1) / mass
        coeffs = torch.cat((coeffs[:-1], scale[None], coeffs[-1:]))
        codes = 2 * codes + (residual >= 0)
        if refine:
            coeffs = refit(*code_sums(codes, importance, groups, 2 ** (len(coeffs) - 1)), coeffs, offsets)
    return stored(coeffs), codes


def order_planes(coeffs: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """(coeffs, codes) with the same levels, the scales nonnegative and descending in every group."""
    scales, bits = coeffs[:-1], len(coeffs) - 1
    _, order = scales.abs().sort(dim=0, descending=True, stable=True)
    ordered = scales.gather(0, order)
    result = torch.zeros_like(codes)
    for plane in range(bits):
        bit = (codes >> (bits - 1 - order[plane])[:, None]) & 1
        result = 2 * result + (bit ^ (ordered[plane] < 0).long()[:, None])
    return torch.cat((ordered.abs(), coeffs[-1:])), result


def fit_prefix(
    groups: Tensor, importance: Tensor | None, codes: Tensor, coeffs: Tensor, planes: int, offsets: bool, stored: Stored
) -> Tensor:
    """Stored coeffs `[planes + 1, R]` for the first `planes` planes of given codes: least squares, codes fixed."""
    bits = len(coeffs) - 1
    start = torch.cat((coeffs[:planes], coeffs[-1:]))
    prefix = codes >> (bits - planes)
    fitted = stored(refit(*code_sums(prefix, importance, groups, 2**planes), start, offsets))

    def error(candidate: Tensor) -> Tensor:
        return squared_error(groups - level_table(candidate).gather(1, prefix), importance)

    return torch.where(error(fitted) < error(start) * GAIN, fitted, start)
