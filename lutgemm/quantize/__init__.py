"""Quantizers: tensors in, format records out. No data needed; methods and guarantees are in docs/quantize.md."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor

from ..config import BCQConfig, CodebookConfig
from ..errors import ArgumentError
from ..formats import BCQWeight, CodebookWeight
from .bcq import quantize_bcq
from .codebook import quantize_codebook
from .measure import weight_error
from .slabs import Weight, WeightRows


def quantize(
    weight: Weight, config: BCQConfig | CodebookConfig, hessian: Tensor | None = None
) -> BCQWeight | CodebookWeight:
    """Quantize `[N, K]`, a tensor or `WeightRows`, as `config` says.

    Raises `ArgumentError` as `quantize_bcq` and `quantize_codebook` do.
    """
    if not isinstance(config, BCQConfig | CodebookConfig):
        raise ArgumentError(f"config is a {type(config).__name__}; pass a BCQConfig or a CodebookConfig")
    options = {field.name: getattr(config, field.name) for field in fields(config)}
    if isinstance(config, BCQConfig):
        return quantize_bcq(weight, hessian=hessian, **options)
    return quantize_codebook(weight, hessian=hessian, **options)


__all__ = ["WeightRows", "quantize", "quantize_bcq", "quantize_codebook", "weight_error"]
