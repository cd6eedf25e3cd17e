"""What the kernels are compared with: torch's own ways to run a linear layer, each as copies of one call.

The float baselines multiply random weights of the same shape: their time does not depend on the values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from lutgemm.errors import ArgumentError
from lutgemm.testing.timing import cold_copies

Copies = list[Callable[[], object]]
INT4_GROUP = 128


def _count(nbytes: int, cold: bool) -> int:
    return cold_copies(nbytes) if cold else 1


def _dense(x: Tensor, n: int, cold: bool, dtype: torch.dtype) -> Copies:
    k = x.shape[1]
    activations, weight = x.to(dtype), torch.randn(n, k, device=x.device).to(dtype)
    copies = _count(weight.nbytes, cold)
    return [partial(linear, activations, w) for w in (weight, *(weight.clone() for _ in range(copies - 1)))]


def _int8_dynamic(x: Tensor, n: int, cold: bool) -> Copies:
    """torch's dynamically quantized int8 layer: activations are quantized in every call."""
    k = x.shape[1]
    activations = x.to(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [
            torch.ao.quantization.quantize_dynamic(
                torch.nn.Sequential(torch.nn.Linear(k, n, bias=False)), {torch.nn.Linear}, dtype=torch.qint8
            )[0]
            for _ in range(_count(n * k, cold))
        ]
    return [partial(layer, activations) for layer in layers]


def _int4(x: Tensor, n: int, cold: bool) -> Copies:
    """torch's 4-bit weight-only kernel (bf16 activations, groups of 128)."""
    k = x.shape[1]
    if k % INT4_GROUP or n % 16:
        raise ArgumentError(f"baseline torch_int4 takes K a multiple of {INT4_GROUP} and N of 16, got N={n}, K={k}")
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    grid = torch.rand(k // INT4_GROUP, n, 2).to(torch.bfloat16)
    activations = x.to(torch.bfloat16)
    copies = _count(packed.nbytes + grid.nbytes, cold)
    run = torch.ops.aten._weight_int4pack_mm_for_cpu
    return [partial(run, activations, packed.clone(), INT4_GROUP, grid.clone()) for _ in range(copies)]


BASELINES: dict[str, Callable[[Tensor, int, bool], Copies]] = {
    "torch_fp32": partial(_dense, dtype=torch.float32),
    "torch_bf16": partial(_dense, dtype=torch.bfloat16),
    "torch_fp16": partial(_dense, dtype=torch.float16),
    "torch_int8": _int8_dynamic,
    "torch_int4": _int4,
}
"""Name -> function of (x [M, K], N, cold) that gives the copies of its call."""

DEFAULT_BASELINES = ("torch_fp32", "torch_bf16")


def parse_baselines(names: Sequence[str]) -> list[str]:
    """The names, each checked. Raises `ArgumentError` for one that does not exist."""
    for name in names:
        if name not in BASELINES:
            raise ArgumentError(f"baselines: {name!r} is unknown; use some of {list(BASELINES)}")
    return list(names)
