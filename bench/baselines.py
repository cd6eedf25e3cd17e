"""What the kernels are compared with: other ways to run a linear layer, each as copies of one call.

A baseline prepares a random weight `[N, K]` in its own format and says what arithmetic a correct result may differ by.
Its result is checked against fp64 on its own dequantized weight: the error is that of activations and sums, not of the
weight's quantization, which differs from format to format.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lutgemm import _native
from lutgemm.errors import ArgumentError, BackendError

from . import peers, peers_cuda
from .layer import Layer, Request, usual_group
from .textbook import textbook_layer

INT8_ENGINES = ("x86", "onednn")
"""torch's engines of int8 layers, the first that this torch has."""


@dataclass(frozen=True)
class Baseline:
    """A way to run a linear layer. `prepare` raises `BackendError` with the reason where it cannot run."""

    label: str
    """for people: in tables and drawings"""
    prepare: Callable[[Request], Layer]
    bound: Callable[[Tensor], float]
    """x -> the largest relative L2 error that a correct result may have"""
    threaded: bool = False
    """Whether what `prepare` makes depends on the number of threads."""


def _need_cpu(request: Request, name: str) -> None:
    if request.device != "cpu":
        raise BackendError(f"{name} runs on cpu, and the device is {request.device}")


def _dense(request: Request, dtype: torch.dtype) -> Layer:
    weight = request.weight().to(request.device, dtype)
    copies = [weight, *(weight.clone() for _ in range(request.copies(weight.nbytes) - 1))]

    def bind(x: Tensor) -> list[Callable[[], Any]]:
        activations = x.to(dtype)
        return [partial(linear, activations, copy) for copy in copies]

    return Layer(lambda: weight.float(), weight.nbytes, bind)


def _int8_dynamic(request: Request) -> Layer:
    """torch's dynamically quantized int8 layer: activations are quantized in every call, 7 bits for the whole x."""
    _need_cpu(request, "torch_int8")
    engine = next((e for e in INT8_ENGINES if e in torch.backends.quantized.supported_engines), None)
    if engine is None:
        raise BackendError(f"torch_int8: this torch has none of the engines {list(INT8_ENGINES)}")
    dense = request.weight()
    scales = dense.abs().amax(1).clamp(min=1e-12).double() / 127
    before = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zeros = torch.zeros(request.N, dtype=torch.int64)
        weight = torch.quantize_per_channel(dense, scales, zeros, 0, torch.qint8)
        torch.backends.quantized.engine = engine
        try:
            nbytes = request.N * (request.K + 4)
            packed = [torch.ops.quantized.linear_prepack(weight, None) for _ in range(request.copies(nbytes))]
        finally:
            torch.backends.quantized.engine = before

    def bind(x: Tensor) -> list[Callable[[], Any]]:
        activations = x.float()
        return [partial(torch.ops.quantized.linear_dynamic, activations, p, reduce_range=True) for p in packed]

    return Layer(weight.dequantize, nbytes, bind)


INT4_TILES = 8
"""innerKTiles of torch's CUDA kernel: the most, which makes the widest loads."""


def _int4_packed(codes: Tensor, device: str) -> tuple[Tensor, Callable[..., Tensor]]:
    """codes 0..15 `[N, K]` as torch's int4 kernel of the device takes them, and that kernel."""
    if device == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), torch.ops.aten._weight_int4pack_mm_for_cpu
    if codes.shape[1] % (16 * INT4_TILES):
        raise BackendError(f"torch_int4 takes K a multiple of {16 * INT4_TILES} on {device}, got K={codes.shape[1]}")
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).to(device)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, INT4_TILES), torch.ops.aten._weight_int4pack_mm


def _int4(request: Request) -> Layer:
    """torch's 4-bit weight-only kernel: bf16 activations, groups of 128 where they divide K."""
    n, k = request.N, request.K
    if n % 16:
        raise BackendError(f"torch_int4 takes N a multiple of 16, got N={n}")
    group = usual_group("torch_int4", k)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32, generator=generator)
    packed, run = _int4_packed(codes, request.device)
    scales = (torch.rand(k // group, n, generator=generator) + 0.5) / k**0.5 / 8
    grid = torch.stack([scales, torch.zeros_like(scales)], 2).to(request.device, torch.bfloat16)
    nbytes = packed.nbytes + grid.nbytes
    copies = [(packed.clone(), grid.clone()) for _ in range(request.copies(nbytes))]
    narrow = codes.to(request.device, torch.int8)

    def dense() -> Tensor:
        return (narrow - 8).float() * grid[..., 0].float().T.repeat_interleave(group, 1)

    def bind(x: Tensor) -> list[Callable[[], Any]]:
        activations = x.to(torch.bfloat16)
        return [partial(run, activations, p, group, g) for p, g in copies]

    return Layer(dense, nbytes, bind)


def _in_huge_pages(source: Tensor) -> Tensor:
    """A copy of `source` in pages of 2 MiB where the system gives them: small ones cost a third of the bandwidth."""
    memory = mmap.mmap(-1, source.nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=source.dtype).view(source.shape).copy_(source)


def _gemv(request: Request, dtype: torch.dtype) -> Layer:
    """Our own dense matrix-vector product, as fast as memory: what torch's could reach at one token. fp32 sums."""
    _need_cpu(request, "dense GEMV")
    host, reason = _native.host()
    if host is None:
        raise BackendError(f"dense GEMV: {reason}")
    if request.threads != 1:
        raise BackendError("dense GEMV has one thread; beside several, compare with the read bandwidth")
    weight = request.weight().to(dtype)
    copies = [_in_huge_pages(weight) for _ in range(request.copies(weight.nbytes))]
    name = str(dtype).removeprefix("torch.")

    def bind(x: Tensor) -> list[Callable[[], Any]]:
        if len(x) != 1:
            raise BackendError(f"dense GEMV takes one token, got M={len(x)}")
        activations, y = x.float().contiguous(), torch.empty(1, request.N)

        def call(copy: Tensor) -> Tensor:
            host.dense_gemv(copy.data_ptr(), activations.data_ptr(), y.data_ptr(), request.N, request.K, name)
            return y

        return [partial(call, copy) for copy in copies]

    return Layer(lambda: weight, weight.nbytes, bind)


def rounding(x: Tensor, steps: int, block: int | None = None) -> float:
    """Relative L2 error of rounding each block of a row of x (None: all of x at once) to `steps` steps of its range."""
    m, k = x.shape
    wide = x.double()
    blocks = wide.view(1, -1) if block is None else torch.nn.functional.pad(wide, (0, -k % block)).view(m, -1, block)
    step = (blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)) / steps
    return float((step.square() / 12).mean().sqrt() / blocks.square().mean().sqrt())


FLOAT_MARGIN = 2.0
"""Errors are at most this many times what rounding each number independently gives."""


def _floating(unit_roundoff: float) -> Callable[[Tensor], float]:
    """Numbers of that precision in and out, fp32 sums; 8 roundings' worth for sums that are rounded on the way."""
    return lambda x: 8 * unit_roundoff


def _int8_per_tensor(x: Tensor) -> float:
    return FLOAT_MARGIN * rounding(x, 127) + 1e-3


def _int8_per_block(x: Tensor) -> float:
    return FLOAT_MARGIN * rounding(x, 254, usual_group("ONNX Runtime", x.shape[1])) + 1e-3


BF16 = 2.0**-8
TEXTBOOK_BITS = (1, 2, 3, 4)
BASELINES: dict[str, Baseline] = {
    "torch_fp32": Baseline("torch fp32", partial(_dense, dtype=torch.float32), _floating(2.0**-20)),
    "torch_bf16": Baseline("torch bf16", partial(_dense, dtype=torch.bfloat16), _floating(BF16 / 4)),
    "torch_fp16": Baseline("torch fp16", partial(_dense, dtype=torch.float16), _floating(2.0**-11)),
    "torch_int8": Baseline("torch int8 dynamic", _int8_dynamic, _int8_per_tensor),
    "torch_int4": Baseline("torch int4", _int4, _floating(BF16 / 2)),
    "gemv_fp32": Baseline("dense GEMV fp32", partial(_gemv, dtype=torch.float32), _floating(2.0**-20), threaded=True),
    "gemv_bf16": Baseline("dense GEMV bf16", partial(_gemv, dtype=torch.bfloat16), _floating(2.0**-20), threaded=True),
    "ort_4bit": Baseline(
        "ONNX Runtime 4-bit", partial(peers.onnxruntime_layer, bits=4), _int8_per_block, threaded=True
    ),
    "ort_2bit": Baseline(
        "ONNX Runtime 2-bit", partial(peers.onnxruntime_layer, bits=2), _int8_per_block, threaded=True
    ),
    "bnb_nf4": Baseline("bitsandbytes NF4", peers.bitsandbytes_layer, _floating(BF16 / 2)),
    "bnb_nf4_cuda": Baseline("bitsandbytes NF4, CUDA", peers_cuda.nf4_layer, _floating(2.0**-11)),
    "torchao_int4": Baseline("torchao int4", peers_cuda.torchao_layer, _floating(BF16 / 2)),
    **{
        f"gemlite_{bits}bit": Baseline(
            f"gemlite {bits}-bit", partial(peers_cuda.gemlite_layer, bits=bits), _floating(2.0**-11)
        )
        for bits in (1, 2, 4)
    },
    **{
        f"humming_{bits}bit": Baseline(
            f"humming {bits}-bit", partial(peers_cuda.humming_layer, bits=bits), _floating(2.0**-11)
        )
        for bits in (1, 2, 3, 4)
    },
    **{
        f"textbook_{bits}bit": Baseline(
            f"textbook LUT-GEMM {bits}-bit", partial(textbook_layer, bits=bits), lambda x: 2.0**-11 * x.shape[1] ** 0.5
        )
        for bits in TEXTBOOK_BITS
    },
}
"""Every baseline by name, in the order of tables."""

DEFAULT_BASELINES = ("torch_fp32", "torch_bf16")
ON_CUDA_ONLY = tuple(
    name for name in BASELINES if name.startswith(("textbook", "gemlite", "humming", "torchao", "bnb_nf4_cuda"))
)
GPU_BASELINES = ("torch_fp16", "torch_bf16", "torch_int4", *ON_CUDA_ONLY)
SUITE_BASELINES = {
    "cpu": tuple(name for name in BASELINES if name not in ("torch_fp16", *ON_CUDA_ONLY)),
    "gpu": GPU_BASELINES,
    "gpu-all": GPU_BASELINES,
}
"""Suite -> what stands beside it: all that run there. torch's fp16 is a slow fallback on CPUs."""


def parse_baselines(names: Sequence[str]) -> list[str]:
    """The names, each checked; "all" stands for every one. Raises `ArgumentError` for one that does not exist."""
    if tuple(names) == ("all",):
        return list(BASELINES)
    for name in names:
        if name not in BASELINES:
            raise ArgumentError(f"baselines: {name!r} is unknown; use all, or some of {list(BASELINES)}")
    return list(dict.fromkeys(names))
