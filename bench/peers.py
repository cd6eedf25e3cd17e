"""Baselines of other packages, of the extra `bench-peers`: ONNX Runtime's MatMulNBits and bitsandbytes' NF4."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from lutgemm.errors import BackendError

from .layer import Layer, Request, usual_group

ORT_ACCURACY_LEVEL = 4
"""Activations of 8 bits: ONNX Runtime's fastest."""
NF4_BLOCK = 64
NF4_ROWS = 32
"""bitsandbytes packs rows for its CPU kernel in blocks of so many."""


def module(package: str, extra: str = "bench-peers") -> Any:
    """The package of an extra, or `BackendError` with the reason why it cannot be used."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # bitsandbytes warns of an optional kernel when it is imported
    try:
        return importlib.import_module(package)
    except (ImportError, OSError, RuntimeError, AssertionError, AttributeError) as error:  # torch without CUDA asserts
        reason = " ".join(str(error).split())
        raise BackendError(f"{package} cannot be imported ({reason}); pip install 'lutgemm[{extra}]'") from None
    finally:
        logging.disable(before)


def _ort_weight(n: int, k: int, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Random codes uint8 `[N, K/block, block*bits/8]`, low bits first, and scales fp32 `[N, K/block]`."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (n, k // block, block * bits // 8), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, k // block, generator=generator) + 0.5) / k**0.5 / 2 ** (bits - 1)
    return codes, scales


def _ort_dense(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    parts = torch.stack([codes >> shift & (2**bits - 1) for shift in range(0, 8, bits)], -1)
    n, blocks = scales.shape
    values = parts.view(n, blocks, -1).float() - 2 ** (bits - 1)
    return (values * scales.unsqueeze(2)).view(n, -1)


def _ort_model(codes: Tensor, scales: Tensor, bits: int) -> bytes:
    """A model of one MatMulNBits node, x -> y."""
    onnx = module("onnx")
    helper, fp32 = onnx.helper, onnx.TensorProto.FLOAT
    n, blocks, block = codes.shape[0], codes.shape[1], codes.shape[2] * 8 // bits
    weights = [onnx.numpy_helper.from_array(codes.numpy(), "codes")]
    weights += [onnx.numpy_helper.from_array(scales.flatten().numpy(), "scales")]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=blocks * block,
        N=n,
        bits=bits,
        block_size=block,
        accuracy_level=ORT_ACCURACY_LEVEL,
    )
    x, y = (helper.make_tensor_value_info(name, fp32, ["M", size]) for name, size in (("x", blocks * block), ("y", n)))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "linear", [x], [y], weights)
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def onnxruntime_layer(request: Request, bits: int) -> Layer:
    """MatMulNBits of ONNX Runtime, one session per copy. Activations are rounded in blocks of the weight's group.

    Its idle threads spin by default, and those of one copy would take the cores from the next: with several threads
    and several copies they stop at the end of a call.
    """
    ort = module("onnxruntime")
    if request.device != "cpu":
        raise BackendError(f"ONNX Runtime's {bits}-bit layer runs on cpu here, and the device is {request.device}")
    codes, scales = _ort_weight(request.N, request.K, bits, usual_group("ONNX Runtime", request.K))
    nbytes = codes.nbytes + scales.nbytes
    model, count = _ort_model(codes, scales, bits), request.copies(nbytes)
    options = ort.SessionOptions()
    options.intra_op_num_threads = request.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if request.threads > 1 and count > 1:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        sessions = [ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for _ in range(count)]
    except RuntimeError as error:
        raise BackendError(f"onnxruntime {ort.__version__} has no {bits}-bit MatMulNBits: {error}") from None

    def bind(x: Tensor) -> list[Callable[[], Any]]:
        feed = {"x": x.float().numpy()}
        return [lambda session=session: session.run(None, feed)[0] for session in sessions]  # type: ignore[misc]

    return Layer(lambda: _ort_dense(codes, scales, bits), nbytes, bind)


@lru_cache(maxsize=1)
def _nf4(n: int, k: int) -> tuple[Any, Any, Callable[[], Tensor]]:
    """Codes and quantization state of one NF4 layer as bitsandbytes' CPU kernel takes them; what gives its weight."""
    bnb = module("bitsandbytes")
    weight = Request(n, k, cold=False, threads=1).weight()
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=NF4_BLOCK)
    layer = layer.to("cpu").eval()
    dense = partial(bnb.functional.dequantize_4bit, layer.weight.data, copy.copy(layer.weight.quant_state))
    layer(torch.zeros(1, k))  # its first call packs the weight for the CPU
    return layer.weight.data, layer.weight.quant_state, dense


def bitsandbytes_layer(request: Request) -> Layer:
    """NF4 with bf16 activations, by `bitsandbytes.matmul_4bit`."""
    bnb = module("bitsandbytes")
    n, k = request.N, request.K
    if request.device != "cpu" or n % NF4_ROWS or k % NF4_BLOCK:
        raise BackendError(
            f"bitsandbytes NF4 runs on cpu with N a multiple of {NF4_ROWS} and K of {NF4_BLOCK} here, "
            f"got {request.device}, N={n}, K={k}"
        )
    codes, state, dense = _nf4(n, k)
    nbytes = codes.nbytes + state.absmax.nbytes
    copies = []
    for _ in range(request.copies(nbytes)):
        own = copy.copy(state)
        own.absmax = state.absmax.clone()
        copies.append((codes.clone(), own))

    def bind(x: Tensor) -> list[Callable[[], Any]]:
        activations = x.to(torch.bfloat16)
        return [partial(bnb.matmul_4bit, activations, data, quant_state=own) for data, own in copies]

    return Layer(dense, nbytes, bind)
