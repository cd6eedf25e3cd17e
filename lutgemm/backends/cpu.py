"""The CPU backend: the C++ kernels of `csrc/cpu` behind the ops.

Kernels exist for several instruction sets; the best one that the CPU has is taken at run time. `LUTGEMM_CPU_ISA` holds
every call to another one, `use_isa` the calls of a block.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache

import torch
from torch import Tensor

from .. import _native
from ..accuracy import EXACT, NEAR_EXACT
from ..errors import ArgumentError
from ..formats import BCQWeight
from . import Backend, Problem, Reason, prepared, tuned
from .heuristics import choose_on_cpu

ARM = platform.machine().lower() in ("aarch64", "arm64")
ISAS = ("scalar", "neon") if ARM else ("scalar", "avx2", "avx512", "avx512vbmi")
"""By the number that kernels know them by; each includes the ones before it. avx2: with FMA and F16C. avx512: F, BW, DQ
and VL. avx512vbmi: also VBMI and GFNI."""

ISA_VARIABLE = "LUTGEMM_CPU_ISA"

PANEL_BYTES = 2 << 20
"""Most bytes of dequantized weight at a time: it bounds the memory of `dequantize` whatever the layer, and panels that
fit in a cache were 5 times faster than ones of 32 MiB, whose pages the system hands out anew each time."""

CODEBOOK_KIND = "blocks"

_forced_isa: ContextVar[int | None] = ContextVar("lutgemm_cpu_isa", default=None)


@cache
def _op(name: str) -> Callable[..., Tensor]:
    """A C++ operator as the function that enters the dispatcher: 1.2 us less than by `torch.ops.lutgemm.<name>`."""
    overload = getattr(torch.ops.lutgemm, name).default
    return getattr(overload, "_op", overload)


@lru_cache(maxsize=1)
def _best_isa() -> int:
    return int(torch.ops.lutgemm._cpu_isa())


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this CPU runs and this installation has kernels for; () without compiled kernels."""
    return () if _native.load_ops("_C") else ISAS[: _best_isa() + 1]


@lru_cache(maxsize=1)
def _environment_isa() -> tuple[int, Reason | None]:
    """(the instruction set for calls outside `use_isa`, None), or (0, why `LUTGEMM_CPU_ISA` cannot be obeyed)."""
    name = os.environ.get(ISA_VARIABLE, "")
    if not name:
        return _best_isa(), None
    if name not in ISAS:
        return 0, f"{ISA_VARIABLE}={name!r} is unknown; use one of {list(ISAS)} or unset it"
    if reason := _native.load_ops("_C"):
        return 0, f"{ISA_VARIABLE}={name!r}, but there are no compiled kernels ({reason}); build them or unset it"
    if name not in available_isas():
        return 0, f"{ISA_VARIABLE}={name!r}, but this CPU has {list(available_isas())}; use one of these or unset it"
    return ISAS.index(name), None


def _isa() -> int:
    forced = _forced_isa.get()
    return _environment_isa()[0] if forced is None else forced


def isa() -> str:
    """The instruction set that calls from here would use. Needs the compiled kernels."""
    return ISAS[_isa()]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Hold the CPU calls of this block (and thread) to one of `available_isas()`; `ArgumentError` for another name."""
    if name not in available_isas():
        raise ArgumentError(f"isa={name!r} is not available; this CPU and installation have {list(available_isas())}")
    token = _forced_isa.set(ISAS.index(name))
    try:
        yield
    finally:
        _forced_isa.reset(token)


def _unavailable() -> Reason | None:
    return _native.load_ops("_C") or _environment_isa()[1]


def _misconfigured() -> Reason | None:
    return _environment_isa()[1] if os.environ.get(ISA_VARIABLE) else None


def _unsupported(problem: Problem, algorithm: str) -> Reason | None:
    return None


def _bcq_tensors(
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    ratios: Tensor | None,
    in_features: int,
    group_size: int,
    scale_kind: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int, bool]:
    """The arguments that describe a weight to the C++ operators: contiguous, the ratio kind in its free form (fp32)."""
    if ratios is not None:
        scales = scales.to(torch.float32) * ratios[:, None, None]
        offsets = None if offsets is None else offsets.to(torch.float32)
    return (
        codes.contiguous(),
        scales.contiguous(),
        None if offsets is None else offsets.contiguous(),
        None if zeros is None else zeros.contiguous(),
        in_features,
        group_size,
        scale_kind == "uniform",
    )


BcqTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""codes, scales, offsets, zeros, ratios"""


def _packed_kind(isa: int, accuracy: int) -> str:
    """The BCQ layout to read: "words" for tables in fp32; for integer ones "bytes" (AVX-512 VBMI) or "nibbles".

    Scalar code gains nothing from integers: its kernels in fp32 serve every accuracy. Nor does AVX-512 without VBMI
    from integers of 16 bits by nibbles, which took 7 to 10 % longer than fp32 in most shapes.
    """
    if accuracy == EXACT or isa == 0 or (accuracy == NEAR_EXACT and ISAS[isa] == "avx512"):
        return "words"
    return "bytes" if ISAS[isa] == "avx512vbmi" else "nibbles"


def integer_tables(problem: Problem) -> bool:
    """Whether the look-up kernels that would run `problem` from here use integer tables of AVX-512.

    Those of AVX2 take about as long as tables in fp32 do with AVX-512, so the thresholds of these hold for them.
    """
    name = ISAS[_isa()]
    if problem.op == "bcq_linear":
        return name.startswith("avx512") and _packed_kind(_isa(), problem.accuracy) != "words"
    return name == "avx512vbmi" and problem.accuracy != EXACT and problem.codebook_bits <= 8


def _choose(problem: Problem) -> str:
    rows = tuned.rows(isa(), torch.get_num_threads())
    return choose_on_cpu(problem, integer_tables(problem), rows)


def _bcq_packed(tensors: BcqTensors, in_features: int, group_size: int, scale_kind: str, kind: str) -> Tensor:
    """The weight in a layout of `_packed_kind`, kept with its tensors."""
    parameters = (in_features, group_size, scale_kind, tensors[2] is None)
    packed = prepared.find(tensors, parameters, kind)
    if packed is None:
        state = prepared.state_of(tensors)
        packed = _op("_bcq_pack_cpu")(*_bcq_tensors(*tensors, *parameters[:3]), kind != "words", kind == "bytes")
        prepared.keep(tensors, parameters, state, kind, packed)
    return packed


def _stacked_rows(tensors: Sequence[Tensor | None], dim: int) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(given, dim) if given else None


def bcq_linear_stacked(
    x: Tensor, weights: Sequence[BCQWeight], biases: Sequence[Tensor | None], algorithm: str, accuracy: int
) -> Tensor:
    """x `[M, K]` times all rows of several weights of one K and layout, without ratios: `[M, sum of N]`.

    biases: one of each weight, or None of all. A row's result is what it is in a call of its own.
    """
    isa, first = _isa(), weights[0]
    kind, uniform = _packed_kind(isa, accuracy), first.scale_kind == "uniform"
    tensors = (*(t for w in weights for t in (w.codes, w.scales, w.offsets, w.zeros)), *biases)
    given = (uniform, first.offsets is None, biases[0] is None)
    parameters = ("stacked", len(weights), first.shape[1], first.group_size, *given)
    packed = prepared.find(tensors, parameters, kind)
    if packed is None:
        state = prepared.state_of(tensors)
        codes, scales = torch.cat([w.codes for w in weights], 1), torch.cat([w.scales for w in weights], 1)
        offsets = _stacked_rows([w.offsets for w in weights], 0)
        zeros = _stacked_rows([w.zeros for w in weights], 0)
        record = (codes, scales, offsets, zeros, first.shape[1], first.group_size, uniform)
        packed = _op("_bcq_pack_cpu")(*record, kind != "words", kind == "bytes")
        prepared.keep(tensors, parameters, state, kind, packed)
    bias = None if biases[0] is None else prepared.find(tensors, parameters, "bias")
    if bias is None and (bias := _stacked_rows(biases, 0)) is not None:
        prepared.keep(tensors, parameters, prepared.state_of(tensors), "bias", bias)
    out_features = sum(weight.shape[0] for weight in weights)
    return _op("_bcq_linear_cpu")(x.contiguous(), packed, bias, out_features, algorithm == "biqgemm", isa, accuracy)


def _codebook_packed(tensors: tuple[Tensor, Tensor, Tensor], in_features: int, group_size: int) -> Tensor:
    """The weight of tensors (codes, codebooks, scales) in the layout of the codebook kernels, kept with them."""
    parameters = (in_features, group_size)
    packed = prepared.find(tensors, parameters, CODEBOOK_KIND)
    if packed is None:
        state = prepared.state_of(tensors)
        packed = _op("_codebook_pack_cpu")(*(t.contiguous() for t in tensors), *parameters)
        prepared.keep(tensors, parameters, state, CODEBOOK_KIND, packed)
    return packed


def _dequantized_linear(x: Tensor, out_features: int, bias: Tensor | None, rows: Callable[..., Tensor]) -> Tensor:
    """x `[..., K]` times a weight made panel by panel. rows(begin, end, dtype) returns W[begin:end].

    fp16 is multiplied in fp32, which torch does several times faster on a CPU, and rounded once.
    """
    wide = x.dtype == torch.float16
    inner, inner_bias = (x.float(), None if bias is None else bias.float()) if wide else (x, bias)
    panel = max(1, PANEL_BYTES // (x.shape[-1] * inner.element_size()))
    y = x.new_empty(*x.shape[:-1], out_features)
    with torch.autocast("cpu", enabled=False):
        for begin in range(0, out_features, panel):
            end = min(out_features, begin + panel)
            panel_bias = None if inner_bias is None else inner_bias[begin:end]
            y[..., begin:end] = torch.nn.functional.linear(inner, rows(begin, end, inner.dtype), panel_bias)
    return y


def _bcq_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    ratios: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    scale_kind: str,
    algorithm: str,
    accuracy: int,
) -> Tensor:
    x, isa, out_features, in_features = x.contiguous(), _isa(), codes.shape[1], x.shape[-1]
    bias = None if bias is None else bias.contiguous()
    if algorithm == "dequantize":
        record = _bcq_tensors(codes, scales, offsets, zeros, ratios, in_features, group_size, scale_kind)

        def rows(begin: int, end: int, dtype: torch.dtype) -> Tensor:
            return _op("_bcq_dequantize_cpu")(*record, begin, end, dtype, isa)

        return _dequantized_linear(x, out_features, bias, rows)
    kind = _packed_kind(isa, accuracy)
    packed = _bcq_packed((codes, scales, offsets, zeros, ratios), in_features, group_size, scale_kind, kind)
    return _op("_bcq_linear_cpu")(x, packed, bias, out_features, algorithm == "biqgemm", isa, accuracy)


def _codebook_linear(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    algorithm: str,
    accuracy: int,
) -> Tensor:
    x, isa, in_features = x.contiguous(), _isa(), x.shape[-1]
    bias = None if bias is None else bias.contiguous()
    record = (codes.contiguous(), codebooks.contiguous(), scales.contiguous())
    if algorithm == "dequantize":

        def rows(begin: int, end: int, dtype: torch.dtype) -> Tensor:
            return _op("_codebook_dequantize_cpu")(*record, in_features, group_size, begin, end, dtype, isa)

        return _dequantized_linear(x, codes.shape[1], bias, rows)
    packed = _codebook_packed((codes, codebooks, scales), in_features, group_size)
    return _op("_codebook_linear_cpu")(x, *record, bias, packed, group_size, isa, accuracy)


BACKEND = Backend(
    name="cpu",
    device_types=("cpu",),
    algorithms={"bcq_linear": ("lut_gemm", "biqgemm", "dequantize"), "codebook_linear": ("codegemm", "dequantize")},
    unavailable=_unavailable,
    unsupported=_unsupported,
    choose=_choose,
    bcq_linear=_bcq_linear,
    codebook_linear=_codebook_linear,
    misconfigured=_misconfigured,
)
