"""Runs the test kernels of tests/emulation/*.cu on numpy arrays: under the emulator, or on a GPU."""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REQUIRED
from emulated_build import ROOT, Control, build, compiler

SOURCES = [ROOT / "tests" / "emulation" / f"{name}.cu" for name in ("primitives", "faults", "hopper", "hopper_faults")]


class Call(ctypes.Structure):
    _fields_ = [
        *(field for name in "aby" for field in ((name, ctypes.c_void_p), (f"{name}_bytes", ctypes.c_int64))),
        *((name, ctypes.c_int64) for name in ("n", "blocks", "threads_x", "threads_y", "dynamic_shared", "dependent")),
    ]


Memory = tuple[int, int]
"""address and bytes"""
ONES, ONE = np.ones(64, np.int32), np.ones(1, np.int32)
NVCC = shutil.which("nvcc") or next((path for path in ["/usr/local/cuda/bin/nvcc"] if Path(path).exists()), None)


def call_kernel(run: Callable, kernel: str, y: Memory, *inputs: Memory, **numbers: int) -> str | None:
    """None, or the error of the launch. numbers: fields of Call, by default one block of one warp and n = 0."""
    fields = {"blocks": 1, "threads_x": 32, "threads_y": 1, **numbers}
    a, b = (*inputs, y, y)[:2]
    for name, (address, size) in {"a": a, "b": b, "y": y}.items():
        fields |= {name: address, f"{name}_bytes": size}
    error = run(kernel.encode(), Call(**fields))
    return error.decode() if error else None


def declare(run: Callable) -> Callable:
    run.argtypes, run.restype = [ctypes.c_char_p, ctypes.POINTER(Call)], ctypes.c_char_p  # type: ignore[attr-defined]
    return run


def on_host(run: Callable, kernel: str, y: np.ndarray, *inputs: np.ndarray, **numbers: int) -> np.ndarray:
    memory = [(array.ctypes.data, array.nbytes) for array in (y, *inputs)]
    assert call_kernel(run, kernel, *memory, **numbers) is None
    return y


def on_gpu(run: Callable, kernel: str, y: np.ndarray, *inputs: np.ndarray, **numbers: int) -> np.ndarray:
    arrays = [torch.from_numpy(array.reshape(-1).view(np.uint8)).cuda() for array in (y, *inputs)]
    memory = [(array.data_ptr(), array.numel()) for array in arrays]
    assert call_kernel(run, kernel, *memory, **numbers) is None
    return arrays[0].cpu().numpy().view(y.dtype).reshape(y.shape)


class Emulator(Control):
    """Runs the test kernels on numpy arrays."""

    def __init__(self) -> None:
        super().__init__(emulated_library())
        self.run_primitive = declare(self.library.run_primitive)
        self.run_fault = declare(self.library.run_fault)
        self.run_hopper = declare(self.library.run_hopper)
        self.run_hopper_fault = declare(self.library.run_hopper_fault)

    def primitive(self, kernel: str, y: np.ndarray, *inputs: np.ndarray, **numbers: int) -> np.ndarray:
        """y, filled by the kernel of primitives.cu."""
        return on_host(self.run_primitive, kernel, y, *inputs, **numbers)

    def hopper(self, kernel: str, y: np.ndarray, *inputs: np.ndarray, **numbers: int) -> np.ndarray:
        """y, filled by the kernel of hopper.cu."""
        return on_host(self.run_hopper, kernel, y, *inputs, **numbers)

    def fault(
        self, kernel: str, n: int = 0, a: np.ndarray = ONES, y: np.ndarray | None = None, **numbers: int
    ) -> str | None:
        """The error of the launch, if any."""
        y = np.full(64, -1, np.int32) if y is None else y
        memory = [(array.ctypes.data, array.nbytes) for array in (y, a, ONE)]
        return call_kernel(self.run_fault, kernel, *memory, n=n, **numbers)


class Gpu:
    """Runs the kernels of primitives.cu and hopper.cu on the GPU, as nvcc compiles them for it."""

    def primitive(self, kernel: str, y: np.ndarray, *inputs: np.ndarray, **numbers: int) -> np.ndarray:
        library = gpu_library("primitives", "-arch=native")
        return on_gpu(declare(library.run_primitive), kernel, y, *inputs, **numbers)

    def hopper(self, kernel: str, y: np.ndarray, *inputs: np.ndarray, **numbers: int) -> np.ndarray:
        library = gpu_library("hopper", "-gencode=arch=compute_90a,code=sm_90a")
        return on_gpu(declare(library.run_hopper), kernel, y, *inputs, **numbers)


@cache
def emulated_library() -> Path:
    """Built once a run; raises RuntimeError without a g++."""
    return build("primitives", SOURCES)


@cache
def gpu_library(source: str, target: str) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="lutgemm-primitives-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [str(NVCC), "-std=c++17", "-O3", target, f"-I{ROOT / 'csrc'}", "-shared", "-Xcompiler", "-fPIC"]
    file = ROOT / "tests" / "emulation" / f"{source}.cu"
    subprocess.run([*command, "-o", str(folder / "kernels.so"), str(file)], check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def emulator_or_skip() -> Emulator:
    if compiler() is None:
        (pytest.fail if "emulator" in REQUIRED else pytest.skip)("no g++ to compile kernels for the host")
    return Emulator()
