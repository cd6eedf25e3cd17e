"""Runs the test kernels of tests/emulation/*.cu on numpy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from emulated_build import ROOT, Control, build

SOURCES = [ROOT / "tests" / "emulation" / name for name in ("primitives.cu", "faults.cu")]


class Call(ctypes.Structure):
    _fields_ = [
        *(field for name in "aby" for field in ((name, ctypes.c_void_p), (f"{name}_bytes", ctypes.c_int64))),
        *((name, ctypes.c_int64) for name in ("n", "blocks", "threads_x", "threads_y", "dynamic_shared", "dependent")),
    ]


NOTHING = np.zeros(1, np.int32)


class Emulator(Control):
    """Runs the test kernels on numpy arrays."""

    def __init__(self, library: Path) -> None:
        super().__init__(library)
        for run in (self.library.run_primitive, self.library.run_fault):
            run.argtypes = [ctypes.c_char_p, ctypes.POINTER(Call)]
            run.restype = ctypes.c_char_p

    def call(self, run: Callable, kernel: str, y: np.ndarray, *inputs: np.ndarray, **numbers: int) -> str | None:
        """None, or the error of the launch. numbers: fields of Call, by default one block of one warp and n = 0."""
        fields = {"blocks": 1, "threads_x": 32, "threads_y": 1, **numbers}
        a, b = (*inputs, NOTHING, NOTHING)[:2]
        for name, array in {"a": a, "b": b, "y": y}.items():
            fields |= {name: array.ctypes.data, f"{name}_bytes": array.nbytes}
        error = run(kernel.encode(), Call(**fields))
        return error.decode() if error else None

    def primitive(self, kernel: str, y: np.ndarray, *inputs: np.ndarray, **numbers: int) -> np.ndarray:
        """y, filled by the kernel."""
        assert self.call(self.library.run_primitive, kernel, y, *inputs, **numbers) is None
        return y

    def fault(self, kernel: str, n: int = 0, *, a_words: int = 64, **numbers: int) -> str | None:
        """The error of the launch, if any, with a_words * 4 bytes of input and 256 of output."""
        y, a = np.full(64, -1, np.int32), np.ones(a_words, np.int32)
        return self.call(self.library.run_fault, kernel, y, a, n=n, **numbers)


@cache
def library() -> Path:
    """Built once a run; raises RuntimeError without a g++."""
    return build("primitives", SOURCES)
