"""Derivatives of the operators `bcq_linear` and `codebook_linear`, of the public ones and of those behind them.

They all take the tensors of `torch.ops.lutgemm.bcq_linear` or `codebook_linear` first, then group_size and (BCQ)
scale_kind, and end in choices of their own, which have no derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError


def _spread(grads: list[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """One entry per need, None where there was none."""
    given = iter(grads)
    return [next(given) if need else None for need in needs]


def bcq_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, offsets, zeros, ratios, _, ctx.group_size, ctx.scale_kind, *_ = inputs
    ctx.save_for_backward(x, codes, scales, offsets, zeros, ratios)


def bcq_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, scales, offsets, zeros, ratios = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    if wanted[5]:
        raise ArgumentError("ratios do not take a gradient; train scales and offsets")
    needs = [wanted[0], *wanted[2:5]]
    grads = torch.ops.lutgemm.bcq_linear_backward(
        grad_y, x, codes, scales, offsets, zeros, ratios, ctx.group_size, ctx.scale_kind, needs
    )
    grad_x, grad_scales, grad_offsets, grad_zeros = _spread(grads, needs)
    grad_bias = grad_y.sum(0) if wanted[6] else None
    rest = [None] * (len(wanted) - 7)
    return grad_x, None, grad_scales, grad_offsets, grad_zeros, None, grad_bias, *rest


def codebook_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, codebooks, scales, _, ctx.group_size, *_ = inputs
    ctx.save_for_backward(x, codes, codebooks, scales)


def codebook_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, codebooks, scales = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = [wanted[0], *wanted[2:4]]
    grads = torch.ops.lutgemm.codebook_linear_backward(grad_y, x, codes, codebooks, scales, ctx.group_size, needs)
    grad_x, grad_codebooks, grad_scales = _spread(grads, needs)
    grad_bias = grad_y.sum(0) if wanted[4] else None
    rest = [None] * (len(wanted) - 5)
    return grad_x, None, grad_codebooks, grad_scales, grad_bias, *rest
