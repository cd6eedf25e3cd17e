"""The public functions, and the torch operators behind them: argument checks, schemas, fakes and autograd.

    y[M, N] = x[M, K] @ W[N, K].T + bias

`bcq_linear` -> `torch.ops.lutgemm.bcq_linear` -> `backends.select` -> one backend function. Nothing else chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import AUTO, Problem, select
from .errors import ArgumentError
from .formats import BCQWeight, CodebookWeight, QuantizedWeight
from .gradients import bcq_gradients, codebook_gradients

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_library = torch.library.Library("lutgemm", "FRAGMENT")
_library.define(
    "bcq_linear(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, Tensor? zeros, Tensor? ratios, Tensor? bias, "
    "Tensor? packed, int group_size, str scale_kind, str backend, str algorithm) -> Tensor"
)
_library.define(
    "codebook_linear(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, Tensor? bias, Tensor? packed, "
    "int group_size, str backend, str algorithm) -> Tensor"
)
_library.define(
    "bcq_linear_backward(Tensor grad_y, Tensor x, Tensor codes, Tensor scales, Tensor? offsets, Tensor? zeros, "
    "Tensor? ratios, int group_size, str scale_kind, bool[] needs) -> Tensor[]"
)
_library.define(
    "codebook_linear_backward(Tensor grad_y, Tensor x, Tensor codes, Tensor codebooks, Tensor scales, "
    "int group_size, bool[] needs) -> Tensor[]"
)


def bcq_linear(
    x: Tensor, weight: BCQWeight, bias: Tensor | None = None, *, backend: str = AUTO, algorithm: str = AUTO
) -> Tensor:
    """`x @ W.T + bias` for a BCQ weight.

    x: `[..., K]`, fp32, fp16 or bf16, on the weight's device. bias: `[N]`, of x's dtype. Returns `[..., N]` of x's
    dtype; sums are fp32. backend: "auto" or a key of `lutgemm.backends()`. algorithm: "auto", "lut_gemm" (LUT-GEMM,
    ICLR 2024, section 3), "biqgemm" (BiQGEMM, SC 2020) or "dequantize". An explicit choice runs or raises.

    Raises `ArgumentError` for a wrong shape, dtype, device or name, `BackendError` when an explicit choice cannot run.
    """
    if not isinstance(weight, BCQWeight):
        raise ArgumentError(f"weight: got {type(weight).__name__}, bcq_linear takes a BCQWeight")
    _check(x, weight, bias)
    t = weight.tensors
    y = torch.ops.lutgemm.bcq_linear(
        x.reshape(-1, weight.shape[1]),
        t["codes"],
        t["scales"],
        t.get("offsets"),
        t.get("zeros"),
        t.get("ratios"),
        bias,
        weight.packed(),
        weight.group_size,
        weight.scale_kind,
        backend,
        algorithm,
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def codebook_linear(
    x: Tensor, weight: CodebookWeight, bias: Tensor | None = None, *, backend: str = AUTO, algorithm: str = AUTO
) -> Tensor:
    """`x @ W.T + bias` for a codebook weight.

    Shapes, dtypes, `backend` and errors as in `bcq_linear`. algorithm: "auto", "codegemm" (CodeGEMM, NeurIPS 2025,
    section 3: the Psumbook) or "dequantize".
    """
    if not isinstance(weight, CodebookWeight):
        raise ArgumentError(f"weight: got {type(weight).__name__}, codebook_linear takes a CodebookWeight")
    _check(x, weight, bias)
    y = torch.ops.lutgemm.codebook_linear(
        x.reshape(-1, weight.shape[1]),
        weight.codes,
        weight.codebooks,
        weight.scales,
        bias,
        weight.packed(),
        weight.group_size,
        backend,
        algorithm,
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, **choice: str) -> Tensor:
    """`bcq_linear` or `codebook_linear`, by the weight's format."""
    if isinstance(weight, BCQWeight):
        return bcq_linear(x, weight, bias, **choice)
    if isinstance(weight, CodebookWeight):
        return codebook_linear(x, weight, bias, **choice)
    raise ArgumentError(f"weight: got {type(weight).__name__}, expected a BCQWeight or a CodebookWeight")


def _check(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> None:
    n, k = weight.shape
    if x.ndim < 1 or x.shape[-1] != k:
        raise ArgumentError(f"x: got shape {list(x.shape)}, its last dimension must be K={k} (weight is {n}x{k})")
    if x.dtype not in ACTIVATION_DTYPES:
        raise ArgumentError(f"x: got dtype {x.dtype}, use torch.float32, torch.float16 or torch.bfloat16")
    if x.device != weight.device:
        raise ArgumentError(f"x is on {x.device}, the weight on {weight.device}; move one with .to()")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ArgumentError(
            f"bias: got {bias.dtype} {list(bias.shape)} on {bias.device}, expected {x.dtype} [{n}] on {x.device}"
        )


def _bcq_run(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    ratios: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    group_size: int,
    scale_kind: str,
    backend: str,
    algorithm: str,
) -> Tensor:
    m, k = x.shape
    bits, n = codes.shape[:2]
    problem = Problem("bcq_linear", x.device.type, x.dtype, m, n, k, group_size, bits, scale_kind)
    chosen, name = select(problem, backend, algorithm)
    return chosen.bcq_linear(x, codes, scales, offsets, zeros, ratios, bias, packed, group_size, scale_kind, name)


def _codebook_run(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    packed: Tensor | None,
    group_size: int,
    backend: str,
    algorithm: str,
) -> Tensor:
    m, k = x.shape
    num_codebooks, n = codes.shape[:2]
    vec_len, codebook_bits = codebooks.shape[2], codebooks.shape[1].bit_length() - 1
    problem = Problem(
        "codebook_linear",
        x.device.type,
        x.dtype,
        m,
        n,
        k,
        group_size,
        num_codebooks,
        vec_len=vec_len,
        codebook_bits=codebook_bits,
    )
    chosen, name = select(problem, backend, algorithm)
    return chosen.codebook_linear(x, codes, codebooks, scales, bias, packed, group_size, name)


_library.impl("bcq_linear", _bcq_run, "CompositeExplicitAutograd")
_library.impl("codebook_linear", _codebook_run, "CompositeExplicitAutograd")

_library.impl("bcq_linear_backward", bcq_gradients, "CompositeExplicitAutograd")
_library.impl("codebook_linear_backward", codebook_gradients, "CompositeExplicitAutograd")


@torch.library.register_fake("lutgemm::bcq_linear", lib=_library)
def _bcq_fake(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[1])


@torch.library.register_fake("lutgemm::codebook_linear", lib=_library)
def _codebook_fake(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[1])


def _empty_like(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape)
        for tensor, need in zip(tensors, needs, strict=True)
        if need and tensor is not None
    ]


@torch.library.register_fake("lutgemm::bcq_linear_backward", lib=_library)
def _bcq_backward_fake(
    grad_y: Tensor,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    ratios: Tensor | None,
    group_size: int,
    scale_kind: str,
    needs: list[bool],
) -> list[Tensor]:
    return _empty_like((x, scales, offsets, zeros), needs)


@torch.library.register_fake("lutgemm::codebook_linear_backward", lib=_library)
def _codebook_backward_fake(
    grad_y: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, group_size: int, needs: list[bool]
) -> list[Tensor]:
    return _empty_like((x, codebooks, scales), needs)


def _spread(grads: list[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """One entry per need, None where there was none."""
    given = iter(grads)
    return [next(given) if need else None for need in needs]


def _bcq_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, offsets, zeros, ratios, _, _, ctx.group_size, ctx.scale_kind, _, _ = inputs
    ctx.save_for_backward(x, codes, scales, offsets, zeros, ratios)


def _bcq_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, scales, offsets, zeros, ratios = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    if wanted[5]:
        raise ArgumentError("ratios do not take a gradient; train scales and offsets")
    needs = [wanted[0], *wanted[2:5]]
    grads = torch.ops.lutgemm.bcq_linear_backward(
        grad_y, x, codes, scales, offsets, zeros, ratios, ctx.group_size, ctx.scale_kind, needs
    )
    grad_x, grad_scales, grad_offsets, grad_zeros = _spread(grads, needs)
    grad_bias = grad_y.sum(0) if wanted[6] else None
    return grad_x, None, grad_scales, grad_offsets, grad_zeros, None, grad_bias, None, None, None, None, None


def _codebook_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, codebooks, scales, _, _, ctx.group_size, _, _ = inputs
    ctx.save_for_backward(x, codes, codebooks, scales)


def _codebook_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, codebooks, scales = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = [wanted[0], *wanted[2:4]]
    grads = torch.ops.lutgemm.codebook_linear_backward(grad_y, x, codes, codebooks, scales, ctx.group_size, needs)
    grad_x, grad_codebooks, grad_scales = _spread(grads, needs)
    grad_bias = grad_y.sum(0) if wanted[4] else None
    return grad_x, None, grad_codebooks, grad_scales, grad_bias, None, None, None, None


torch.library.register_autograd("lutgemm::bcq_linear", _bcq_backward, setup_context=_bcq_setup, lib=_library)
torch.library.register_autograd(
    "lutgemm::codebook_linear", _codebook_backward, setup_context=_codebook_setup, lib=_library
)
