"""Where Triton 3.6's interpreter differs from a GPU, or stops: mended, so that kernels can be checked in it.

- Bounds of loops are converted by `int(array)` of one element, which NumPy 2.4 and later refuse: `item()` instead.
- fp32 is cut to bf16, not rounded, and bf16 is multiplied by `tl.dot` as the integers that hold it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def _to_bf16(values: Any) -> Any:
    """fp32 -> the bits of bf16, rounded to nearest even."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.uint16).numpy()


def _from_bf16(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def mend() -> None:
    """To be called once, before the first kernel runs in the interpreter."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    patch_tensor, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot

    def mended_patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def mended_cast(self: Any, src: Any, dst_type: Any) -> Any:
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return handle(_to_bf16(src.data), tl.bfloat16)
        return (
            handle(_from_bf16(src.data), tl.float32) if pair == (tl.bfloat16, tl.float32) else cast(self, src, dst_type)
        )

    def mended_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (handle(_from_bf16(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 else h for h in (a, b))
        return dot(self, a, b, d, *rest)

    interpreter._patch_lang_tensor = mended_patch
    builder.cast_impl = mended_cast
    builder.create_fp_to_fp = lambda self, src, dst_type, rounding_mode: mended_cast(self, src, dst_type)
    builder.create_dot = mended_dot
