"""`quantize_bcq`: a weight to binary codes, slab by slab."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import BCQConfig
from ..errors import ArgumentError
from ..formats import BCQLayout, BCQWeight
from ..formats.base import parse_scale_dtype, resolve_group_size
from ..formats.bcq import GROUP_MULTIPLE, pack_bits
from .free import fit_free, fit_prefix, order_planes
from .measure import weight_error
from .slabs import (
    Block,
    Stored,
    Weight,
    check_hessian,
    check_stored,
    check_weight,
    column_blocks,
    full_precision,
    group_importance,
    one_thread,
    power_of_two,
    read,
    slabs,
)
from .uniform import best_grid, clip_search, rtn_grid

GRID_METHODS = ("best", "rtn", "rtn_clip")
"""Methods that an integer grid has."""

SAMPLE_ELEMENTS = 1 << 17
"""Weights that `scale_kind="auto"` is decided on."""


def quantize_bcq(
    weight: Weight,
    bits: int = 4,
    group_size: int | str = 128,
    hessian: Tensor | None = None,
    *,
    scale_kind: str = "auto",
    method: str = "best",
    offsets: bool = True,
    scale_dtype: str = "float16",
    iters: int = 15,
    nested_bits: tuple[int, ...] = (),
) -> BCQWeight:
    """Quantize `[N, K]`, any floating dtype, any device, to `bits` binary planes; the meaning of each option is with
    `BCQConfig`, the methods are explained in docs/quantize.md.

    With `method="best"` the error of every group is at most that of `method="rtn"` of the same scale kind and dtypes.
    hessian: `[K]`, or `[K, K]` of which the diagonal is used: the weight of each column in the squared error.
    Deterministic; groups are independent of each other; working memory is about 25 MB beside the result.

    Raises `ArgumentError` on NaN or Inf, on a shape or an option that is not supported, and when `scale_dtype`
    overflows.
    """
    config = BCQConfig(bits, group_size, scale_kind, method, offsets, scale_dtype, iters, tuple(nested_bits))
    n, k = check_weight(weight)
    importance = check_hessian(hessian, weight)
    size = resolve_group_size(group_size, k, GROUP_MULTIPLE)
    kind = _decide(config)
    with one_thread(weight.device), full_precision(weight.device):
        if kind == "auto":
            kind = _cheaper_kind(weight, importance, config, size)
        return _Result(config, kind, n, k, size, weight.device).fill(weight, importance)


def _decide(config: BCQConfig) -> str:
    """The scale kind, or "auto" where the numbers must tell."""
    if config.scale_kind == "uniform":
        if config.method not in GRID_METHODS:
            raise ArgumentError(
                f'method={config.method!r} has no integer grid; use scale_kind="free", or one of {list(GRID_METHODS)}'
            )
        if config.nested_bits:
            raise ArgumentError(
                f'nested_bits={config.nested_bits} needs scale_kind="free" (any uniform weight has all its prefixes)'
            )
    if config.scale_kind != "auto":
        return config.scale_kind
    if config.nested_bits or config.method not in GRID_METHODS:
        return "free"
    return "auto" if config.method == "best" else "uniform"


def _cheaper_kind(weight: Weight, importance: Tensor | None, config: BCQConfig, size: int) -> str:
    """The kind of less distortion at equal rate: the lower `error * 4**bits_per_weight` on evenly spaced rows.

    A bit a weight is worth 6 dB, a factor of 4 in squared error. Ties go to "uniform", whose kernels read fewer scales.
    """
    n, k = weight.shape
    count = min(n, max(16, SAMPLE_ELEMENTS // k))
    sample = read(weight, torch.arange(count, device=weight.device) * n // count)
    cost = {}
    for kind in ("uniform", "free"):
        trial = _Result(config, kind, count, k, size, weight.device).fill(sample, importance)
        cost[kind] = weight_error(sample, trial, importance)[0] * 4.0**trial.bits_per_weight
    return "free" if cost["free"] < cost["uniform"] else "uniform"


class _Result:
    """The tensors of a BCQ weight while its slabs are being filled in."""

    def __init__(self, config: BCQConfig, kind: str, n: int, k: int, size: int, device: torch.device) -> None:
        self.config, self.kind, self.size = config, kind, size
        self.layout = BCQLayout(
            out_features=n,
            in_features=k,
            bits=config.bits,
            group_size=size,
            scale_kind=kind,
            has_offsets=kind == "free" and config.offsets,
            scale_dtype=config.scale_dtype,
            nested_bits=tuple(sorted(set(config.nested_bits))),
        )
        specs = self.layout.specs()
        self.tensors = {name: torch.zeros(s.shape, dtype=s.dtype, device=device) for name, s in specs.items()}
        self.tensors["header"] = self.layout.header().to(device)
        self.scale_dtype = parse_scale_dtype(config.scale_dtype)

    def fill(self, weight: Weight, importance: Tensor | None) -> BCQWeight:
        n, k = self.layout.shape
        blocks = column_blocks(k, self.size)
        for rows in slabs(n, k):
            slab = read(weight, rows)
            codes = torch.empty(slab.shape, dtype=torch.uint8, device=slab.device)
            for block in blocks:
                own = group_importance(importance, block, len(slab))
                codes[:, block.start : block.stop] = self._fit(block.split(slab), own, block, rows).view(len(slab), -1)
            for plane in range(self.config.bits):
                self.tensors["codes"][plane, rows] = pack_bits((codes >> (self.config.bits - 1 - plane)) & 1)
        for name in self.tensors.keys() - {"header", "codes", "zeros"}:
            check_stored(name.split("_")[0], self.tensors[name], self.config.scale_dtype)
        return BCQWeight(self.layout, self.tensors)

    def _fit(self, groups: Tensor, importance: Tensor | None, block: Block, rows: slice) -> Tensor:
        """Fit one block of one slab, store its scales, and return its codes uint8 `[R, S]`."""
        config = self.config
        unit = power_of_two(groups)
        stored = Stored(self.scale_dtype, unit)
        groups = groups / unit[:, None]
        if self.kind == "uniform":
            if config.method == "rtn":
                grid = rtn_grid(groups, config.bits, stored)
            elif config.method == "rtn_clip":
                grid = clip_search(groups, importance, config.bits, stored)
            else:
                grid = best_grid(groups, importance, config.bits, stored, config.iters)
            self._put("scales", grid.scale[None], stored, block, rows)
            self.tensors["zeros"][rows, block.groups] = grid.zero.to(torch.uint8).view(-1, block.count)
            return grid.codes(groups, config.bits).to(torch.uint8)
        coeffs, codes = fit_free(groups, importance, config.bits, config.method, config.offsets, config.iters, stored)
        coeffs, codes = order_planes(coeffs, codes)
        self._put_free("", coeffs, stored, block, rows)
        for planes in self.layout.nested_bits:
            own = fit_prefix(groups, importance, codes, coeffs, planes, config.offsets, stored)
            self._put_free(f"_{planes}", own, stored, block, rows)
        return codes.to(torch.uint8)

    def _put_free(self, suffix: str, coeffs: Tensor, stored: Stored, block: Block, rows: slice) -> None:
        self._put(f"scales{suffix}", coeffs[:-1], stored, block, rows)
        if self.config.offsets:
            self._put(f"offsets{suffix}", coeffs[-1:], stored, block, rows)

    def _put(self, name: str, values: Tensor, stored: Stored, block: Block, rows: slice) -> None:
        """values `[planes, R]` in the unit -> the rows and groups of the named tensor."""
        self.tensors[name][..., rows, block.groups] = stored.expand(values).unflatten(-1, (-1, block.count))
