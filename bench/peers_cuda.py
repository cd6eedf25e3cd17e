"""Baselines of other packages on CUDA devices, of the extra `bench-peers-cuda`.

Has not run on a GPU yet. On a CPU, the layers of bitsandbytes 0.50.2 gave the right results as they are here, those of
gemlite 0.6.0.post2 in Triton's interpreter, and those of torchao 0.18.0 with stand-ins for torch's two int4 operators,
which CPUs lack; of humming-kernels 0.1.19 a layer was made, filled and read back, without its kernels. Each result is
checked against fp64 before it is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lutgemm.errors import BackendError

from .layer import Layer, Request, usual_group
from .peers import module

EXTRA = "bench-peers-cuda"
TORCHAO_COLUMNS = 1024
"""torchao pads K to a multiple of this for torch's int4 kernel."""


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
    _on_cuda(request, "gemlite")
    gemlite = module("gemlite", EXTRA)
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
    _on_cuda(request, "humming")
    layers = module("humming.layer", EXTRA)
    n, k = request.N, request.K
    group = usual_group("humming", k)
    weight = request.weight().to(request.device, torch.float16)
    rounded: list[Tensor] = []

    def made() -> Any:
        config = {"dtype": f"uint{bits}", "group_size": group}
        layer = layers.HummingLayer(n, k, config, torch_dtype=torch.float16).to(request.device)
        layer.load_from_unquantized(weight)
        if not rounded:  # by humming's own function, before its weight takes the layout of its kernels
            rounded.append(layer.weight_schema.dequant_tensors(layer.state_dict()).cpu())
        layer.transform()
        return layer

    nbytes = n * k * bits // 8 + 2 * n * (k // group)
    calls = _bind_all([made() for _ in range(request.copies(nbytes))], torch.float16)
    return Layer(lambda: rounded[0].float(), nbytes, calls)


def torchao_layer(request: Request) -> Layer:
    """int4 as `torchao.quantization.quantize_` makes it for CUDA devices (tiles for tinygemm), bf16 activations.

    The weight is one that its rounding keeps: integers -8..7, both in every group, times a power of two.
    """
    _on_cuda(request, "torchao")
    quantization = module("torchao.quantization", EXTRA)
    n, k = request.N, request.K
    group = usual_group("torchao", k)
    if n % 16 or k % TORCHAO_COLUMNS:
        raise BackendError(f"torchao takes N a multiple of 16 and K of {TORCHAO_COLUMNS} here, got N={n}, K={k}")
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-8, 8, (n, k // group, group), dtype=torch.int8, generator=generator)
    integers[..., 0], integers[..., 1] = -8, 7
    step = 2.0 ** -round(math.log2(8 * k**0.5))
    weight = integers.view(n, k).to(request.device, torch.bfloat16) * step
    config = quantization.Int4WeightOnlyConfig(
        group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )

    def made() -> Any:
        layer = torch.nn.Linear(k, n, bias=False, device=request.device, dtype=torch.bfloat16).requires_grad_(False)
        layer.weight.copy_(weight)
        quantization.quantize_(layer, config)
        return layer

    nbytes = n * k // 2 + 4 * n * (k // group)
    calls = _bind_all([made() for _ in range(request.copies(nbytes))], torch.bfloat16)
    return Layer(lambda: integers.view(n, k).float() * step, nbytes, calls)


def nf4_layer(request: Request) -> Layer:
    """bitsandbytes' NF4 in blocks of 64 with fp16 activations."""
    _on_cuda(request, "bitsandbytes NF4")
    bnb = module("bitsandbytes", EXTRA)
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
