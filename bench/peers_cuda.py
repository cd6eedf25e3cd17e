"""Baselines of other packages on CUDA devices, of the extra `bench-peers-cuda`: gemlite, humming, bitsandbytes' NF4.

Written from the sources of gemlite 0.6.0.post2 and humming-kernels 0.1.19; has not run on a GPU yet. What is wrong
here shows: each result is checked against fp64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lutgemm.errors import BackendError

from .layer import Layer, Request, usual_group
from .peers import module

EXTRA = "bench-peers-cuda"
MOST_ROUNDED = {1: 1.5, 2: 0.7, 3: 0.35, 4: 0.17}
"""Bits -> the most relative L2 error that humming's own rounding of a normal weight to that many bits can have."""


def _on_cuda(request: Request, name: str) -> None:
    if torch.device(request.device).type != "cuda":
        raise BackendError(f"{name} runs on cuda here, and the device is {request.device}")


def _bind_all(layers: Sequence[Callable[[Tensor], Tensor]], dtype: torch.dtype) -> Callable[[Tensor], list[Any]]:
    def bind(x: Tensor) -> list[Callable[[], Any]]:
        activations = x.to(dtype)
        return [partial(layer, activations) for layer in layers]

    return bind


def gemlite_layer(request: Request, bits: int) -> Layer:
    """Integers of 1, 2, 4 bits with a scale and a zero per group, fp16 activations; W = (integer - zero) * scale."""
    gemlite = module("gemlite", EXTRA)
    _on_cuda(request, "gemlite")
    n, k = request.N, request.K
    group = usual_group("gemlite", k)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator).to(request.device)
    scales = ((torch.rand(n, k // group, generator=generator) + 0.5) / k**0.5 / 2 ** (bits - 1)).half()
    scales = scales.to(request.device)
    zeros = torch.full_like(scales, 2.0 ** (bits - 1))

    def made() -> Any:
        layer = gemlite.GemLiteLinear(
            bits,
            group_size=group,
            in_features=k,
            out_features=n,
            input_dtype=gemlite.DType.FP16,
            output_dtype=gemlite.DType.FP16,
        )
        layer.pack(codes.clone(), scales.clone(), zeros.clone(), None)
        return layer

    nbytes = n * k * bits // 8 + 2 * scales.nbytes

    def dense() -> Tensor:
        return (codes.float() - 2 ** (bits - 1)) * scales.float().repeat_interleave(group, 1)

    return Layer(dense, nbytes, _bind_all([made() for _ in range(request.copies(nbytes))], torch.float16))


def humming_layer(request: Request, bits: int) -> Layer:
    """Unsigned integers of 1 to 4 bits with a scale per group, fp16 activations, rounded by humming itself."""
    layers = module("humming.layer", EXTRA)
    _on_cuda(request, "humming")
    n, k = request.N, request.K
    group = usual_group("humming", k)
    weight = request.weight().to(request.device, torch.float16)

    def made() -> Any:
        layer = layers.HummingLayer(n, k, {"dtype": f"uint{bits}", "group_size": group}, torch_dtype=torch.float16).to(
            request.device
        )
        layer.load_from_unquantized(weight)
        layer.transform()
        return layer

    nbytes = n * k * bits // 8 + 2 * n * (k // group)
    copies = [made() for _ in range(request.copies(nbytes))]

    def dense() -> Tensor:
        """What it multiplies by, read off with unit vectors: exact in fp16. It has to be near the weight given."""
        found = torch.cat(
            [copies[0](rows) for rows in torch.eye(k, dtype=torch.float16, device=weight.device).split(512)]
        )
        error = float((found.T.float() - weight.float()).norm() / weight.float().norm())
        if not error <= MOST_ROUNDED[bits]:
            raise BackendError(f"humming {bits}-bit: its weight differs from the one given by {error:.2f}")
        return found.T.float()

    return Layer(dense, nbytes, _bind_all(copies, torch.float16))


def nf4_layer(request: Request) -> Layer:
    """bitsandbytes' NF4 in blocks of 64 with fp16 activations."""
    bnb = module("bitsandbytes", EXTRA)
    _on_cuda(request, "bitsandbytes NF4")
    if request.K % 64:
        raise BackendError(f"bitsandbytes NF4 takes K a multiple of 64 here, got K={request.K}")
    weight = request.weight().to(request.device, torch.float16)
    quantize = partial(bnb.functional.quantize_4bit, weight, blocksize=64, quant_type="nf4")
    first = quantize()
    nbytes = first[0].nbytes + first[1].absmax.nbytes
    copies = [first, *(quantize() for _ in range(request.copies(nbytes) - 1))]
    calls = [partial(_nf4_product, bnb, data, state) for data, state in copies]
    return Layer(lambda: bnb.functional.dequantize_4bit(*first).float(), nbytes, _bind_all(calls, torch.float16))


def _nf4_product(bnb: Any, data: Tensor, state: Any, x: Tensor) -> Tensor:
    result: Tensor = bnb.matmul_4bit(x, data.t(), quant_state=state)
    return result
