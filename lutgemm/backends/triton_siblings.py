"""Siblings with the Triton kernels, which read stored tensors: those of all siblings are joined and kept
(`gpu_siblings`), a second copy of their weights."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import Kernel, triton
from .gpu_layouts import Layout
from .gpu_siblings import Engine, Stack

Call = tuple[Kernel, tuple[Any, ...]]
"""A function of `triton.BACKEND`, or `_own_codebooks`, and its arguments behind x."""

MOST_SIBLINGS = 4
"""With codebooks of their own."""


@cache
def _capture_info() -> Any:
    """The driver's `(stream, &status, &id)`, which torch has no name for; None where there is none."""
    hip = torch.version.hip is not None
    library, name = ("libamdhip64.so", "hipStream") if hip else ("libcuda.so.1", "cuStream")
    try:
        function = getattr(ctypes.CDLL(library), f"{name}GetCaptureInfo")
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_ulonglong)]
    function.restype = ctypes.c_int
    return function


def _place_of(x: Tensor) -> int | None:
    if not x.is_cuda:
        return 0
    with torch.cuda.device(x.device):
        stream = int(torch.cuda.current_stream().cuda_stream)
        if not torch.cuda.is_current_stream_capturing():
            return stream
    status, number, function = ctypes.c_int(), ctypes.c_ulonglong(), _capture_info()
    if function is None or function(stream, ctypes.byref(status), ctypes.byref(number)) or status.value != 1:
        return None
    return -1 - number.value


def _takes_own_codebooks(algorithm: str, sizes: Sequence[int]) -> bool:
    return len(sizes) <= MOST_SIBLINGS


def _own_codebooks(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    algorithm: str,
    accuracy: int,
    ends: list[int],
) -> Tensor:
    """`triton.BACKEND.codebook_linear` of siblings; codebooks: those of each, one after another."""
    from ..kernels import config, siblings

    k, n, books = x.shape[-1], codes.shape[1], (codes.shape[0], *codebooks.shape[1:])
    flat = x.reshape(-1, k).contiguous()
    if not flat.shape[0]:
        return x.new_empty(0, n)
    task = config.codebook_task(algorithm, flat.shape[0], n, k, books, group_size, x.element_size())
    cut = triton._config(task, x.device.index)
    with triton._on(x):
        y: Tensor = siblings.codebook_siblings(
            flat, codes, codebooks, scales, bias, min(group_size, k), algorithm, cut, ends
        )
    return y


def _call(stack: Stack, x: Tensor, algorithm: str, accuracy: int) -> Call | None:
    if not (stack.shared or _takes_own_codebooks(algorithm, stack.sizes)):
        return None
    kernel = triton.BACKEND.codebook_linear if stack.is_codebook else triton.BACKEND.bcq_linear
    first: Any = stack.siblings[0].record

    def make() -> Layout:
        return tuple(tensor for tensor in stack.record.tensors if tensor is not None)

    kept = iter(stack.keep("triton siblings", make))
    tensors = [None if tensor is None else next(kept) for tensor in first.tensors]
    kind = () if stack.is_codebook else (first.scale_kind,)
    arguments = (*tensors, stack.joined_bias("triton"), first.group_size, *kind, algorithm, accuracy)
    return (kernel, arguments) if stack.shared else (_own_codebooks, (*arguments, stack.ends))


def _run(x: Tensor, call: Call) -> Tensor:
    kernel, arguments = call
    return kernel(x, *arguments)


_ENGINE = Engine("triton", _place_of, _call, _run, _takes_own_codebooks)
ENGINES: dict[Kernel, Engine] = {triton.BACKEND.bcq_linear: _ENGINE, triton.BACKEND.codebook_linear: _ENGINE}
