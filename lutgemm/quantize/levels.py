"""The free kind of BCQ: groups of `2**bits` levels that `bits` scales and an offset span, fitted by least squares.

    level(c) = offset + sum over b of scales[b] * sign(b, c),    sign(b, c) = 2 * bit(bits - 1 - b of c) - 1

Shapes: R groups of S weights; L = 2**bits levels; `coeffs` fp32 `[bits + 1, R]`, the offset last (zero without one).
Every reduction runs over one group alone, so the result of a group does not depend on what it is batched with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .slabs import Stored

GAIN = 1 - 1e-5
"""A fit replaces another when its error is below GAIN times the other's: more than fp32 sums can be wrong by."""


def level_table(coeffs: Tensor) -> Tensor:
    """coeffs `[bits + 1, R]` -> `[R, L]`: the level of every code, in the order of sums of `dequantize`."""
    levels = coeffs[-1][:, None]
    for scale in coeffs[:-1]:
        step = scale[:, None]
        levels = torch.stack((levels - step, levels + step), -1).flatten(1)
    return levels


class SortedGroups:
    """Groups in ascending order, with running sums: what nearest levels need is read off at their L - 1 borders.

    One round of alternating then costs L look-ups a group, not S.
    """

    def __init__(self, groups: Tensor, importance: Tensor | None) -> None:
        self.values, order = groups.sort(-1)
        values = self.values.to(torch.float64)
        weights = torch.ones_like(values) if importance is None else importance.gather(1, order).to(torch.float64)
        self.mass = _running(weights)
        self.moment = _running(weights * values)
        self.energy = (weights * values * values).sum(-1)

    def select(self, keep: Tensor) -> SortedGroups:
        """The groups where `keep` `[R]` is true."""
        other = object.__new__(SortedGroups)
        for name in ("values", "mass", "moment", "energy"):
            setattr(other, name, getattr(self, name)[keep])
        return other

    def nearest(self, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give every weight its nearest level of `[R, L]`.

        Returns fp64 (mass `[R, L]`: importance of the weights of each level, moment `[R, L]`: their weighted sum,
        error `[R]`: the weighted squared error; Inf where a level is not finite).
        """
        ascending, order = levels.sort(-1)
        middle = (ascending[:, 1:] + ascending[:, :-1]) / 2
        border = torch.searchsorted(self.values, middle.contiguous(), right=True)
        size = self.values.shape[1]
        edges = torch.nn.functional.pad(border, (1, 0))
        edges = torch.cat((edges, torch.full_like(border[:, :1], size)), -1)
        mass = self.mass.gather(1, edges).diff(dim=-1)
        moment = self.moment.gather(1, edges).diff(dim=-1)
        level = ascending.to(torch.float64)
        error = self.energy + (level * (level * mass - 2 * moment)).sum(-1)
        error = torch.where(torch.isfinite(error), error.clamp(min=0), torch.inf)
        return torch.empty_like(mass).scatter_(1, order, mass), torch.empty_like(mass).scatter_(1, order, moment), error


def _running(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))


def nearest_codes(groups: Tensor, levels: Tensor) -> Tensor:
    """The code `[R, S]` int64 of the nearest of the levels `[R, L]`."""
    ascending, order = levels.sort(-1)
    middle = ((ascending[:, 1:] + ascending[:, :-1]) / 2).contiguous()
    return order.gather(1, torch.searchsorted(middle, groups))


def code_sums(codes: Tensor, importance: Tensor | None, groups: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """fp64 (mass `[R, L]`, moment `[R, L]`) of given codes `[R, S]`; `SortedGroups.nearest` has the meaning."""
    values = groups.to(torch.float64)
    weights = torch.ones_like(values) if importance is None else importance.to(torch.float64)
    if groups.device.type == "cpu":
        empty = values.new_zeros(len(groups), num_levels)
        return empty.scatter_add(1, codes, weights), empty.scatter_add(1, codes, weights * values)
    # Atomic additions of a GPU would make the sums depend on the run.
    member = [codes == level for level in range(num_levels)]
    mass = torch.stack([(weights * own).sum(-1) for own in member], -1)
    return mass, torch.stack([(weights * values * own).sum(-1) for own in member], -1)


def _walsh(values: Tensor) -> Tensor:
    """Walsh-Hadamard transform over the last dim: entry m is `sum over c of values[c] * (-1)**popcount(c & m)`."""
    length = values.shape[-1]
    half = 1
    while half < length:
        pairs = values.unflatten(-1, (-1, 2, half))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        values = torch.stack((low + high, low - high), -2).flatten(-3)
        half *= 2
    return values


def refit(mass: Tensor, moment: Tensor, coeffs: Tensor, offsets: bool) -> Tensor:
    """Least-squares coeffs `[bits + 1, R]` for fixed codes, given the sums of each level (fp64 `[R, L]`).

    With signs s_b = -(-1)**bit the Gram matrix is one Walsh transform of the masses: <s_a, s_b> = M[a ^ b],
    <s_b, 1> = -M[b]. Solved by Cholesky for the change from the present coeffs, with a small ridge, so that directions
    the codes do not determine stay as they are and the error never rises.
    """
    bits = len(coeffs) - 1
    gram, right = _walsh(mass), _walsh(moment)
    index = [1 << (bits - 1 - b) for b in range(bits)] + ([0] if offsets else [])
    sign = [-1.0] * bits + [1.0]
    size = len(index)
    now = coeffs.to(torch.float64)
    a = [[gram[:, index[i] ^ index[j]] * (sign[i] * sign[j]) for j in range(i + 1)] for i in range(size)]
    residual = []
    for i in range(size):
        value = right[:, index[i]] * sign[i]
        for j in range(size):
            value = value - a[max(i, j)][min(i, j)] * now[j]
        residual.append(value)
    ridge = gram[:, 0] * 1e-9 + 1e-300
    for i in range(size):
        a[i][i] = a[i][i] + ridge
    change = _cholesky_solve(a, residual)
    result = now.clone()
    for i in range(size):
        result[i] += change[i]
    return result.to(torch.float32)


def _cholesky_solve(a: list[list[Tensor]], right: list[Tensor]) -> list[Tensor]:
    """Solve R small systems at once: `a[i][j]` (j <= i) and `right[i]` are `[R]`. Elementwise: a fixed order."""
    size = len(right)
    low: list[list[Tensor]] = []
    for i in range(size):
        low.append([])
        for j in range(i + 1):
            value = a[i][j]
            for t in range(j):
                value = value - low[i][t] * low[j][t]
            low[i].append(value.clamp(min=1e-300).sqrt() if i == j else value / low[j][j])
    half: list[Tensor] = []
    for i in range(size):
        value = right[i]
        for t in range(i):
            value = value - low[i][t] * half[t]
        half.append(value / low[i][i])
    x = list(half)
    for i in reversed(range(size)):
        for t in range(i + 1, size):
            x[i] = x[i] - low[t][i] * x[t]
        x[i] = x[i] / low[i][i]
    return x


def alternate(data: SortedGroups, start: Tensor, offsets: bool, iters: int, stored: Stored) -> tuple[Tensor, Tensor]:
    """Alternate nearest codes and least-squares coeffs, judging each round by the levels **as stored**.

    start `[bits + 1, R]`, not yet rounded. A group stops at its first round without gain.
    Returns (the best stored coeffs `[bits + 1, R]`, their fp64 error `[R]`).
    """
    alive = torch.arange(start.shape[1], device=start.device)
    now = stored(start)
    mass, moment, best_error = data.nearest(level_table(now))
    best = now.clone()
    for _ in range(iters):
        now = stored.select(alive)(refit(mass, moment, now, offsets))
        mass, moment, error = data.nearest(level_table(now))
        better = error < best_error[alive] * GAIN
        if not better.any():
            break
        alive, now, mass, moment = alive[better], now[:, better], mass[better], moment[better]
        data = data.select(better)
        best[:, alive] = now
        best_error[alive] = error[better]
    return best, best_error
