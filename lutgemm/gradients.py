"""Gradients of `x @ W.T` with respect to x and to the floating tensors of the weight; fp32 sums, plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .formats import BCQWeight, CodebookWeight
from .formats.base import expand_groups, num_groups
from .formats.bcq import uniform_center, uniform_plane_weights, unpack_signs


def _group_sums(per_weight: Tensor, group_size: int) -> Tensor:
    """`[N, K]` -> `[N, G]`: sums over the k of each group."""
    k = per_weight.shape[1]
    group_size = min(group_size, k)
    padded = torch.nn.functional.pad(per_weight, (0, -k % group_size))
    return padded.unflatten(1, (num_groups(k, group_size), group_size)).sum(-1)


def _record(tensors: dict[str, Tensor | None], in_features: int, group_size: int, **kind: Any) -> BCQWeight:
    given = {name: t.detach() for name, t in tensors.items() if t is not None}
    return BCQWeight.build(in_features=in_features, group_size=group_size, **given, **kind)  # type: ignore[arg-type]


F = TypeVar("F", bound=Callable[..., list[Tensor]])


def _outside_of_autocast(function: F) -> F:
    """A backward pass inside of `torch.autocast` computes what one outside does."""

    @wraps(function)
    def run(grad_y: Tensor, *arguments: Any) -> list[Tensor]:
        with torch.autocast(grad_y.device.type, enabled=False):
            return function(grad_y, *arguments)

    return cast(F, run)


@_outside_of_autocast
def bcq_gradients(
    grad_y: Tensor,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    ratios: Tensor | None,
    group_size: int,
    scale_kind: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of those of x, scales, offsets, zeros (in this order) that `needs` asks for; each of its own dtype."""
    need_x, need_scales, need_offsets, need_zeros = needs
    k, grads = x.shape[1], {}
    if need_x:
        tensors = {"codes": codes, "scales": scales, "offsets": offsets, "zeros": zeros, "ratios": ratios}
        grads["x"] = grad_y @ _record(tensors, k, group_size, scale_kind=scale_kind).dequantize(grad_y.dtype)
    if need_scales or need_offsets or need_zeros:
        grad_w = grad_y.to(torch.float32).T @ x.to(torch.float32)
        grad_offset = _group_sums(grad_w, group_size)
    if need_scales:
        per_plane = torch.stack([_group_sums(grad_w * unpack_signs(plane, k), group_size) for plane in codes])
        if scale_kind == "free":
            grad_scales = per_plane
        elif scale_kind == "ratio":
            assert ratios is not None
            grad_scales = (per_plane * ratios[:, None, None]).sum(0, keepdim=True)
        else:
            assert zeros is not None
            place = torch.tensor(uniform_plane_weights(len(codes)), dtype=torch.float32, device=x.device)[:, None, None]
            center = uniform_center(zeros, len(codes))
            grad_scales = (per_plane * place).sum(0, keepdim=True) + grad_offset * center
        grads["scales"] = grad_scales.to(scales.dtype)
    if need_offsets:
        assert offsets is not None
        grads["offsets"] = grad_offset.to(offsets.dtype)
    if need_zeros:
        assert zeros is not None
        grads["zeros"] = (-grad_offset * scales[0].to(torch.float32)).to(zeros.dtype)
    return list(grads.values())


@_outside_of_autocast
def codebook_gradients(
    grad_y: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, group_size: int, needs: list[bool]
) -> list[Tensor]:
    """Gradients of those of x, codebooks, scales (in this order) that `needs` asks for; each of its own dtype."""
    need_x, need_codebooks, need_scales = needs
    k, grads = x.shape[1], []

    def weight(of_scales: Tensor) -> CodebookWeight:
        tensors = (codes, codebooks.detach(), of_scales.detach())
        return CodebookWeight.build(*tensors, in_features=k, group_size=group_size)

    if need_x:
        grads.append(grad_y @ weight(scales).dequantize(grad_y.dtype))
    if need_codebooks or need_scales:
        grad_w = grad_y.to(torch.float32).T @ x.to(torch.float32)
    if need_codebooks:
        grads.append(_centroid_gradients(grad_w, codes, codebooks, scales, group_size))
    if need_scales:
        unit = weight(torch.ones_like(scales)).dequantize()
        grads.append(_group_sums(grad_w * unit, group_size).to(scales.dtype))
    return grads


def _centroid_gradients(grad_w: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Each centroid's gradient: the sum over its uses of scale * grad_w."""
    k, vec_len = grad_w.shape[1], codebooks.shape[2]
    scaled = grad_w * expand_groups(scales.detach().to(torch.float32), k, group_size)
    vectors = torch.nn.functional.pad(scaled, (0, -k % vec_len)).unflatten(1, (-1, vec_len)).flatten(0, 1)
    out = torch.zeros_like(codebooks, dtype=torch.float32)
    for c, own in enumerate(codes):
        out[c].index_add_(0, own.flatten().long(), vectors)
    return out.to(codebooks.dtype)
