"""Calls keep nothing: a block that a call leaves behind also keeps the heap from growing back together."""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lutgemm
from lutgemm.backends import cpu
from lutgemm.testing.cases import OpCase

CALLS = 2000


class HeapInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    )


@pytest.fixture
def bytes_in_use() -> Callable[[], int]:
    if not sys.platform.startswith("linux"):
        pytest.skip("mallinfo2 is glibc's")
    try:
        mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError) as error:
        pytest.skip(f"mallinfo2 is not here: {error}")
    mallinfo2.restype = HeapInfo
    return lambda: mallinfo2().uordblks


@pytest.mark.skipif(cpu.BACKEND.unavailable() is not None, reason=f"backend cpu: {cpu.BACKEND.unavailable()}")
@pytest.mark.parametrize("algorithm", ["lut_gemm", "biqgemm", "codegemm", "dequantize"])
@pytest.mark.parametrize("m", [1, 40])
def test_calls_leave_no_memory_behind(bytes_in_use: Callable[[], int], algorithm: str, m: int):
    if algorithm == "codegemm":
        weight = lutgemm.quantize.quantize_codebook(torch.randn(64, 64), group_size=64, iters=1)
        call = lutgemm.codebook_linear
    else:
        weight, call = OpCase(N=64, K=64, bits=3, group_size=64).weight(), lutgemm.bcq_linear
    x = torch.randn(m, 64)

    def use(count: int) -> int:
        before = bytes_in_use()
        for _ in range(count):
            call(x, weight, backend="cpu", algorithm=algorithm)
        return bytes_in_use() - before

    use(200)
    assert min(use(CALLS) for _ in range(3)) < 16 * CALLS


@pytest.mark.skipif(cpu.BACKEND.unavailable() is not None, reason=f"backend cpu: {cpu.BACKEND.unavailable()}")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fused_calls_leave_no_memory_behind(bytes_in_use: Callable[[], int], mode: Callable[[], Any]):
    model = torch.nn.ModuleDict({n: lutgemm.BCQLinear.from_weight(OpCase().weight()) for n in ("w1", "w3")})
    assert lutgemm.fuse(model) == 1

    def use(count: int) -> int:
        before = bytes_in_use()
        with mode():
            x = torch.randn(1, 72)
            for _ in range(count):
                model["w1"](x), model["w3"](x)
        return bytes_in_use() - before

    use(200)
    assert min(use(CALLS) for _ in range(3)) < 16 * CALLS
