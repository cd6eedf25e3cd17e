"""The CPU backend: C++ SIMD kernels of `csrc/cpu` behind the ops."""

from __future__ import annotations

from torch import Tensor

from .. import _native
from . import Backend


def _absent(*_: object) -> Tensor:
    raise RuntimeError("the CPU backend is not available")


BACKEND = Backend(
    name="cpu",
    device_types=("cpu",),
    algorithms={"bcq_linear": ("lut_gemm", "biqgemm", "dequantize"), "codebook_linear": ("codegemm", "dequantize")},
    unavailable=lambda: _native.load_ops("_C") or "kernels are being written",
    unsupported=lambda problem, algorithm: None,
    choose=lambda problem: "dequantize",
    prepare=lambda weight: None,
    bcq_linear=_absent,
    codebook_linear=_absent,
)
