"""The CUDA backend: the kernels of `csrc/cuda` behind the ops.

What each kernel reads, and how it is called, is in `gpu_layouts`. `make_backend` serves the emulator of the tests too,
which runs the same sources on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .. import _native
from . import Backend, Problem, Reason
from .gpu_heuristics import choose_on_gpu
from .gpu_layouts import ALIGNMENT, BcqRecord, CodebookRecord, Record, algorithms, aligned

OLDEST_CAPABILITY = 80
"""10 * major + minor"""


@cache
def _unavailable() -> Reason | None:
    if reason := _native.load_ops("_C_cuda"):
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; check the driver and CUDA_VISIBLE_DEVICES"
    try:
        found = [int(torch.ops.lutgemm._gpu_capability(device)) for device in range(torch.cuda.device_count())]
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        return f"_C_cuda cannot use the GPU: {first_line}; update its driver, or build lutgemm with an older CUDA"
    if max(found) < OLDEST_CAPABILITY:
        return f"the kernels need compute capability {OLDEST_CAPABILITY / 10}, and this GPU has {max(found) / 10}"
    return None


def _rows(x: Tensor) -> Tensor:
    """x `[..., K]` as `[M, K]`: rows of adjacent elements, not overlapping, the first at an aligned address."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1 or flat.stride(0) < flat.shape[1]:
        flat = flat.contiguous()
    return flat if flat.data_ptr() % ALIGNMENT == 0 else flat.clone(memory_format=torch.contiguous_format)


def make_backend(
    name: str, device_type: str, namespace: str, unavailable: Callable[[], Reason | None] = _unavailable
) -> Backend:
    """The backend whose operators are `torch.ops.<namespace>._*_cuda` for tensors of `device_type`."""

    @cache
    def ops(operator: str) -> Callable[..., Tensor]:
        overload = getattr(getattr(torch.ops, namespace), operator).default
        return getattr(overload, "_op", overload)

    def offered(op: str) -> tuple[str, ...]:
        return tuple(algorithm for of, algorithm in algorithms() if of == op)

    def unsupported(problem: Problem, algorithm: str) -> Reason | None:
        return algorithms()[problem.op, algorithm].unsupported(problem)

    def choose(problem: Problem) -> str:
        return choose_on_gpu(problem, offered(problem.op), unsupported)

    def run(op: str, x: Tensor, record: Record, bias: Tensor | None, algorithm: str, accuracy: int) -> Tensor:
        bias = None if bias is None else aligned(bias)
        y = algorithms()[op, algorithm].run(ops, _rows(x), record, bias, accuracy)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], record.out_features)

    def bcq_linear(
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
        record = BcqRecord(codes, scales, offsets, zeros, ratios, x.shape[-1], group_size, scale_kind)
        return run("bcq_linear", x, record, bias, algorithm, accuracy)

    def codebook_linear(
        x: Tensor,
        codes: Tensor,
        codebooks: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        group_size: int,
        algorithm: str,
        accuracy: int,
    ) -> Tensor:
        record = CodebookRecord(codes, codebooks, scales, x.shape[-1], group_size)
        return run("codebook_linear", x, record, bias, algorithm, accuracy)

    return Backend(
        name=name,
        device_types=(device_type,),
        algorithms={op: offered(op) for op in ("bcq_linear", "codebook_linear")},
        unavailable=unavailable,
        unsupported=unsupported,
        choose=choose,
        bcq_linear=bcq_linear,
        codebook_linear=codebook_linear,
    )


BACKEND = make_backend("cuda", "cuda", "lutgemm")
