"""The CUDA backend on CPU tensors: its sources under the emulator, behind the same Python (`lutgemm.backends.cuda`).

LUTGEMM_EMULATED_ONLY="dequantize,lut_gemm" builds these kernels alone, for work on one of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cuda_budget
import emulated_build
import torch
from emulated_build import compiler

from lutgemm.backends import Backend
from lutgemm.backends.cuda import make_backend

ROOT = Path(__file__).resolve().parents[1]
__all__ = ["NAME", "Emulated", "compiler", "emulated"]

NAME = "cuda-emulated"
NAMESPACE = "lutgemm_emulated"
SHARED_SOURCES = ("reduce",)
"""Kernels without a binding of their own."""


@dataclass(frozen=True)
class Emulated:
    """The backend, and the emulator's switches and counts."""

    backend: Backend
    control: emulated_build.Control


def chosen_sources() -> list[Path]:
    """Kernels and bindings to build."""
    csrc = ROOT / "csrc"
    files = [*sorted((csrc / "cuda").glob("*.cu")), *sorted(csrc.glob("bind_cuda*.cpp"))]
    only = [name for name in os.environ.get("LUTGEMM_EMULATED_ONLY", "").split(",") if name]
    if not only:
        return files
    names = {*only, *SHARED_SOURCES}
    return [file for file in files if file.stem.removeprefix("bind_cuda").lstrip("_") in {*names, ""}]


@cache
def emulated() -> Emulated:
    """Builds what is out of date, and loads it. Raises `RuntimeError` with the compiler's words."""
    torch_folder = Path(torch.__file__).parent
    flags = (
        f"-isystem{torch_folder / 'include'}",
        f"-DTORCH_TARGET_VERSION={cuda_budget.build()['STABLE_ABI_TARGET']}",
    )
    links = (f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")
    library = emulated_build.build("lutgemm_emulated", chosen_sources(), flags, links)
    torch.ops.load_library(str(library))
    return Emulated(make_backend(NAME, "cpu", NAMESPACE, lambda: None), emulated_build.Control(library))
