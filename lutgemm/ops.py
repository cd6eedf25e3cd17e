"""The public functions, and the torch operators behind them: argument checks, schemas, fakes and autograd.

    y[M, N] = x[M, K] @ W[N, K].T + bias

`bcq_linear` -> `torch.ops.lutgemm.bcq_linear` -> `backends.select` -> one backend function. Nothing else chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting

from ._plain import is_plain
from .accuracy import AUTO
from .autograd import bcq_backward, bcq_setup, codebook_backward, codebook_setup
from .backends import generation
from .choices import bcq_choice, codebook_choice, held_isa, new_bcq_choice, new_codebook_choice
from .errors import ArgumentError
from .formats import BCQWeight, CodebookWeight, QuantizedWeight
from .gradients import bcq_gradients, codebook_gradients

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_library = torch.library.Library("lutgemm", "FRAGMENT")
_library.define(
    "bcq_linear(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, Tensor? zeros, Tensor? ratios, Tensor? bias, "
    "int group_size, str scale_kind, str backend, str algorithm, str accuracy) -> Tensor"
)
_library.define(
    "codebook_linear(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, Tensor? bias, int group_size, "
    "str backend, str algorithm, str accuracy) -> Tensor"
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
    x: Tensor,
    weight: BCQWeight,
    bias: Tensor | None = None,
    *,
    backend: str = AUTO,
    algorithm: str = AUTO,
    accuracy: str = AUTO,
) -> Tensor:
    """`x @ W.T + bias` for a BCQ weight.

    x: `[..., K]`, fp32, fp16 or bf16, on the weight's device. bias: `[N]`, of x's dtype. Returns `[..., N]` of x's
    dtype; sums are fp32. backend: "auto" or a key of `lutgemm.backends()`. algorithm: "auto", "lut_gemm" (LUT-GEMM,
    ICLR 2024, section 3), "biqgemm" (BiQGEMM, SC 2020) or "dequantize". An explicit choice runs or raises.
    accuracy: the least that will do: "fast" (tables of 8 bits), "accurate" (12 bits; what "auto" means), "near-exact"
    (16 bits) or "exact" (fp32). A kernel may be more exact than that; see `lutgemm.accuracy`.

    A kernel's layout is kept with the weight's tensors. `weight.at(bits)` makes new ones: keep it between calls.

    Raises `ArgumentError` for a wrong shape, dtype, device or name, `BackendError` when an explicit choice cannot run.
    """
    if not isinstance(weight, BCQWeight):
        raise ArgumentError(f"weight: got {type(weight).__name__}, bcq_linear takes a BCQWeight")
    return run_bcq(x, weight, weight.tensors, weight.tensors, None, bias, backend, algorithm, accuracy)


def codebook_linear(
    x: Tensor,
    weight: CodebookWeight,
    bias: Tensor | None = None,
    *,
    backend: str = AUTO,
    algorithm: str = AUTO,
    accuracy: str = AUTO,
) -> Tensor:
    """`x @ W.T + bias` for a codebook weight.

    Shapes, dtypes, `backend`, `accuracy` and errors as in `bcq_linear`. algorithm: "auto", "codegemm" (CodeGEMM,
    NeurIPS 2025, section 3: the Psumbook) or "dequantize".
    """
    if not isinstance(weight, CodebookWeight):
        raise ArgumentError(f"weight: got {type(weight).__name__}, codebook_linear takes a CodebookWeight")
    return run_codebook(x, weight, weight.tensors, weight.tensors, None, bias, backend, algorithm, accuracy)


class Holder(Protocol):
    """A layer: it has a record, unless its tensors have been replaced since."""

    @property
    def weight_record(self) -> Any:
        """The record of its tensors as they are now."""


Held = Mapping[str, Tensor | None]
"""Tensors by their names in a record."""


def run_bcq(
    x: Tensor,
    weight: BCQWeight,
    floats: Held,
    integers: Held,
    holder: Holder | None,
    bias: Tensor | None,
    backend: str,
    algorithm: str,
    accuracy: str,
) -> Tensor:
    """`bcq_linear` of a record, or of a layer.

    floats, integers: the record's tensors, twice, and no holder; or the parameters and the buffers of the holder, whose
    record was `weight`. That a layout is of these very tensors is checked in any case: one pass does both.
    """
    choice, straight = None, direct(x, weight, bias)
    if straight:
        choice = weight.choices.get((x.shape, x.dtype, backend, algorithm, accuracy, generation[0], held_isa()))
        if choice is not None and (ready := choice.ready) is not None and (bias is None or bias.is_contiguous()):
            layout = ready.layout(floats, integers)
            if layout is not None:
                try:
                    return ready.operator(x.contiguous(), layout, bias, *ready.tail)
                except RuntimeError:  # for a wrong bias, which is checked there
                    _check(x, x.shape, weight, bias)
                    raise
    if holder is not None and (now := holder.weight_record) is not weight:
        weight, choice = now, None
        straight = direct(x, weight, bias)
    t, shape = weight.tensors, x.shape
    _check(x, shape, weight, bias)
    record = (t["codes"], t["scales"], t.get("offsets"), t.get("zeros"), t.get("ratios"))
    group_size, scale_kind = weight.group_size, weight.layout.scale_kind
    if straight:
        choice = choice or bcq_choice(x, weight, backend, algorithm, accuracy)
        y = choice.kernel(x, *record, bias, group_size, scale_kind, choice.algorithm, choice.accuracy)
        choice.ready = choice.get_ready(weight, choice.algorithm, choice.accuracy)
        return y
    _refuse_tangents(x, *record, bias)
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    y = _operators(x).bcq_linear(flat, *record, bias, group_size, scale_kind, backend, algorithm, accuracy)
    return y if flat is x else y.view(*shape[:-1], weight.shape[0])


def run_codebook(
    x: Tensor,
    weight: CodebookWeight,
    floats: Held,
    integers: Held,
    holder: Holder | None,
    bias: Tensor | None,
    backend: str,
    algorithm: str,
    accuracy: str,
) -> Tensor:
    """`codebook_linear` of a record or of a layer, as `run_bcq`."""
    choice, straight = None, direct(x, weight, bias)
    if straight:
        choice = weight.choices.get((x.shape, x.dtype, backend, algorithm, accuracy, generation[0], held_isa()))
        if choice is not None and (ready := choice.ready) is not None and (bias is None or bias.is_contiguous()):
            layout = ready.layout(floats, integers)
            if layout is not None:
                record = (integers["codes"], floats["codebooks"], floats["scales"])
                try:
                    return ready.operator(x.contiguous(), *record, bias, layout, *ready.tail)
                except RuntimeError:  # for a wrong bias, which is checked there
                    _check(x, x.shape, weight, bias)
                    raise
    if holder is not None and (now := holder.weight_record) is not weight:
        weight, choice = now, None
        straight = direct(x, weight, bias)
    t, shape = weight.tensors, x.shape
    _check(x, shape, weight, bias)
    record = (t["codes"], t["codebooks"], t["scales"])
    if straight:
        choice = choice or codebook_choice(x, weight, backend, algorithm, accuracy)
        y = choice.kernel(x, *record, bias, weight.group_size, choice.algorithm, choice.accuracy)
        choice.ready = choice.get_ready(weight, choice.algorithm, choice.accuracy)
        return y
    _refuse_tangents(x, *record, bias)
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    y = _operators(x).codebook_linear(flat, *record, bias, weight.group_size, backend, algorithm, accuracy)
    return y if flat is x else y.view(*shape[:-1], weight.shape[0])


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, **choice: str) -> Tensor:
    """`bcq_linear` or `codebook_linear`, by the weight's format."""
    if isinstance(weight, BCQWeight):
        return bcq_linear(x, weight, bias, **choice)
    if isinstance(weight, CodebookWeight):
        return codebook_linear(x, weight, bias, **choice)
    raise ArgumentError(f"weight: got {type(weight).__name__}, expected a BCQWeight or a CodebookWeight")


def _check(x: Tensor, shape: torch.Size, weight: QuantizedWeight, bias: Tensor | None) -> None:
    n, k = weight.shape
    dtype, device = x.dtype, x.device
    if len(shape) < 1 or shape[-1] != k:
        raise ArgumentError(f"x: got shape {list(shape)}, its last dimension must be K={k} (weight is {n}x{k})")
    if dtype not in ACTIVATION_DTYPES:
        raise ArgumentError(f"x: got dtype {dtype}, use torch.float32, torch.float16 or torch.bfloat16")
    if device != weight.tensors["codes"].device:
        raise ArgumentError(f"x is on {device}, the weight on {weight.device}; move one with .to()")
    if bias is not None and (bias.shape != (n,) or bias.dtype != dtype or bias.device != device):
        raise ArgumentError(
            f"bias: got {bias.dtype} {list(bias.shape)} on {bias.device}, expected {dtype} [{n}] on {device}"
        )


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """The operators have no forward-mode derivative, and torch would drop the tangents of their inputs in silence."""
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise ArgumentError(
                    "forward-mode differentiation is not supported by quantized layers; use reverse mode (backward), "
                    "or torch.nn.functional.linear(x, weight.dequantize())"
                )


def direct(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> bool:
    """Whether the dispatcher would do nothing for this call but run `_bcq_run` or `_codebook_run`.

    Those calls go past it: the dispatcher's way through Python took 14 us of the 20 us of a call of a small layer.
    """
    if not (is_plain(x) and (x.is_cpu or x.is_cuda)):
        return False
    if not is_grad_enabled():
        return True
    if x.requires_grad or (bias is not None and bias.requires_grad):
        return False
    return not any([tensor.requires_grad for tensor in weight.tensors.values()])  # noqa: C419 (a list is faster)


def _operators(x: Tensor) -> Any:
    """Who has `bcq_linear` and `codebook_linear` for a call that goes through the dispatcher, or is traced."""
    if x.is_cuda and is_compiling() and not is_exporting():
        from . import traced

        return traced
    return torch.ops.lutgemm


def _bcq_run(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    ratios: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    scale_kind: str,
    backend: str,
    algorithm: str,
    accuracy: str,
) -> Tensor:
    c = new_bcq_choice(x, codes, group_size, scale_kind, backend, algorithm, accuracy)
    return c.kernel(x, codes, scales, offsets, zeros, ratios, bias, group_size, scale_kind, c.algorithm, c.accuracy)


def _codebook_run(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    backend: str,
    algorithm: str,
    accuracy: str,
) -> Tensor:
    c = new_codebook_choice(x, codes, codebooks, group_size, backend, algorithm, accuracy)
    return c.kernel(x, codes, codebooks, scales, bias, group_size, c.algorithm, c.accuracy)


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


torch.library.register_autograd("lutgemm::bcq_linear", bcq_backward, setup_context=bcq_setup, lib=_library)
torch.library.register_autograd(
    "lutgemm::codebook_linear", codebook_backward, setup_context=codebook_setup, lib=_library
)
