"""The reference backend: `lutgemm.reference` behind the ops. Any device, any shape, no compiler needed.

It is exact, whatever accuracy is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ..formats import BCQWeight, CodebookWeight
from . import Backend

_BCQ: dict[str, Callable[[Tensor, BCQWeight], Tensor]] = {
    "lut_gemm": reference.lut_gemm,
    "biqgemm": reference.biqgemm,
    "dequantize": reference.dequantize,
}
_CODEBOOK: dict[str, Callable[[Tensor, CodebookWeight], Tensor]] = {
    "codegemm": reference.codegemm,
    "dequantize": reference.dequantize,
}


def _finish(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def _bcq_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    ratios: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    scale_kind: str,
    algorithm: str,
    accuracy: int,
) -> Tensor:
    weight = BCQWeight.build(
        codes,
        scales,
        in_features=x.shape[-1],
        group_size=group_size,
        scale_kind=scale_kind,
        offsets=offsets,
        zeros=zeros,
        ratios=ratios,
    )
    with torch.autocast(x.device.type, enabled=False):
        y = _finish(_BCQ[algorithm](x.reshape(-1, x.shape[-1]), weight), x, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _codebook_linear(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    algorithm: str,
    accuracy: int,
) -> Tensor:
    weight = CodebookWeight.build(codes, codebooks, scales, in_features=x.shape[-1], group_size=group_size)
    with torch.autocast(x.device.type, enabled=False):
        y = _finish(_CODEBOOK[algorithm](x.reshape(-1, x.shape[-1]), weight), x, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


BACKEND = Backend(
    name="reference",
    device_types=(),
    algorithms={"bcq_linear": tuple(_BCQ), "codebook_linear": tuple(_CODEBOOK)},
    unavailable=lambda: None,
    unsupported=lambda problem, algorithm: None,
    choose=lambda problem: "dequantize",
    bcq_linear=_bcq_linear,
    codebook_linear=_codebook_linear,
)
