"""Tensors whose changes torch counts: those made in inference mode have no version, and layers hold none of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def normal(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of its own kind where it was made in inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        copy = tensor.clone()
        return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def as_parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    """`tensor` itself when it is a parameter of that kind, else a parameter that aliases it."""
    if isinstance(tensor, nn.Parameter) and tensor.requires_grad == requires_grad and not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return nn.Parameter(normal(tensor).detach(), requires_grad=requires_grad)
