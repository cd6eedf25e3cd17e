"""The LUT-GEMM of the paper, literally, as a baseline on CUDA devices: `cuda/textbook_lut_gemm.cu`, built when used."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutgemm.backends.tuned import cache_file
from lutgemm.errors import BackendError
from lutgemm.formats import BCQWeight
from lutgemm.testing.cases import OpCase

from .layer import Layer, Request, usual_group

SOURCE = Path(__file__).parent / "cuda" / "textbook_lut_gemm.cu"
TILE = 32
"""Columns of W that one of its blocks works on."""


def find_nvcc() -> str:
    """nvcc's path. Raises `BackendError` where there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which(str(Path(home, "bin", "nvcc")))
    if found is None:
        raise BackendError("textbook LUT-GEMM: no nvcc on PATH or in CUDA_HOME to build it with")
    return found


def build(architecture: str, folder: Path) -> Path:
    """The shared library for an architecture such as "sm_90", from `folder` if it is there, else made."""
    key = hashlib.sha256(SOURCE.read_bytes() + architecture.encode()).hexdigest()[:16]
    library = folder / f"textbook-{architecture}-{key}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work, library.name)
        number = architecture.removeprefix("sm_")
        target = f"-gencode=arch=compute_{number},code={architecture}"
        command = [
            find_nvcc(),
            "-std=c++17",
            "-O3",
            target,
            "-shared",
            "-Xcompiler=-fPIC",
            "-o",
            str(made),
            str(SOURCE),
        ]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise BackendError(f"textbook LUT-GEMM: nvcc failed: {ran.stderr.strip()[-500:]}")
        made.replace(library)
    return library


@cache
def _function(architecture: str) -> Any:
    kept = cache_file()
    if kept is None:
        raise BackendError("textbook LUT-GEMM: there is no cache folder to build it in; set XDG_CACHE_HOME to one")
    function = ctypes.CDLL(str(build(architecture, kept.parent))).lutgemm_textbook
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int] * 4 + [ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


def textbook_layout(weight: BCQWeight) -> tuple[Tensor, Tensor, Tensor]:
    """codes int32 `[K/32, bits, N]`, scales fp16 `[G, bits, N]`, offsets fp16 `[G, N]` of a BCQ weight."""
    offsets = weight.plane_offsets()
    assert offsets is not None
    codes = weight.codes.permute(2, 0, 1).contiguous()
    return codes, weight.plane_scales().permute(2, 0, 1).half().contiguous(), offsets.T.half().contiguous()


def textbook_layer(request: Request, bits: int) -> Layer:
    """One token in fp16, by fp16 tables, sums and atomics."""
    n, k = request.N, request.K
    if torch.device(request.device).type != "cuda":
        raise BackendError(f"textbook LUT-GEMM runs on cuda, and the device is {request.device}")
    group = usual_group("textbook LUT-GEMM", k)
    if n % 2:
        raise BackendError(f"textbook LUT-GEMM takes an even N, got N={n}")
    major, minor = torch.cuda.get_device_capability(request.device)
    function = _function(f"sm_{major}{minor}")
    weight = OpCase(N=n, K=k, bits=bits, group_size=group).weight().to(request.device)
    assert isinstance(weight, BCQWeight)
    tensors = textbook_layout(weight)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    copies = [tensors, *(tuple(t.clone() for t in tensors) for _ in range(request.copies(nbytes) - 1))]

    def bind(x: Tensor) -> list[Callable[[], Any]]:
        if len(x) != 1:
            raise BackendError(f"textbook LUT-GEMM takes one token, got M={len(x)}")
        activations = x.half().contiguous()

        def call(codes: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
            y = torch.empty(1, n, dtype=torch.float16, device=x.device)
            stream = torch.cuda.current_stream(x.device).cuda_stream
            pointers = [t.data_ptr() for t in (activations, codes, scales, offsets, y)]
            if code := function(*pointers, n, k, bits, group, stream):
                raise BackendError(f"textbook LUT-GEMM: CUDA error {code}")
            return y

        return [partial(call, *copy) for copy in copies]

    return Layer(partial(weight.dequantize, torch.float32), nbytes, bind)
