"""The CPU backend: the C++ kernels of `csrc/cpu` behind the ops.

Kernels exist for several instruction sets; the best one that the CPU has is taken at run time. `LUTGEMM_CPU_ISA` holds
every call to another one, `use_isa` the calls of a block.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache

import torch
from torch import Tensor

from .. import _native
from ..accuracy import EXACT, NEAR_EXACT
from ..errors import ArgumentError
from ..formats import BCQWeight, CodebookWeight
from . import Backend, Problem, Reason, prepared, tuned
from .heuristics import choose_on_cpu, tiled_tokens
from .prepared import Ready

ARM = platform.machine().lower() in ("aarch64", "arm64")
ISAS = ("scalar", "neon") if ARM else ("scalar", "avx2", "avx512", "avx512vbmi")
"""By the number that kernels know them by; each includes the ones before it. avx2: with FMA and F16C. avx512: F, BW, DQ
and VL. avx512vbmi: also VBMI, VNNI and GFNI."""

ISA_VARIABLE = "LUTGEMM_CPU_ISA"

PANEL_BYTES = 2 << 20
"""Most bytes of dequantized weight at a time: it bounds the memory of `dequantize` whatever the layer, and panels that
fit in a cache were 5 times faster than ones of 32 MiB, whose pages the system hands out anew each time."""

CODEBOOK_KIND = "blocks"

_forced_isa: ContextVar[int | None] = ContextVar("lutgemm_cpu_isa", default=None)
_always_tiles: ContextVar[bool] = ContextVar("lutgemm_cpu_tiles", default=False)


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


BCQ_TENSORS = ("codes", "scales", "offsets", "zeros", "ratios")
BcqTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Those of `BCQ_TENSORS`."""


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


def has_tiles(op: str, accuracy: int) -> bool:
    """Whether `dequantize` can multiply tiles of integers in cache from here: AVX-512 VBMI, up to "accurate"."""
    return op == "bcq_linear" and accuracy < NEAR_EXACT and ISAS[_isa()] == "avx512vbmi"


@contextmanager
def always_tiles() -> Iterator[None]:
    """Have `dequantize` multiply tiles in this block (and thread) wherever `has_tiles`, whatever the thresholds say."""
    token = _always_tiles.set(True)
    try:
        yield
    finally:
        _always_tiles.reset(token)


def _multiplies_tiles(problem: Problem) -> bool:
    if not has_tiles(problem.op, problem.accuracy):
        return False
    rows = tuned.rows(isa(), torch.get_num_threads())
    return _always_tiles.get() or tiled_tokens(problem, rows)[1] >= problem.M


def _choose(problem: Problem) -> str:
    rows = tuned.rows(isa(), torch.get_num_threads())
    return choose_on_cpu(problem, integer_tables(problem), rows, has_tiles(problem.op, problem.accuracy))


def _bcq_packed(tensors: BcqTensors, in_features: int, group_size: int, scale_kind: str, kind: str) -> Tensor:
    """The weight in a layout of `_packed_kind`, kept with its tensors."""
    parameters = (in_features, group_size, scale_kind, tensors[2] is None)
    packed = prepared.find(tensors, parameters, kind)
    if packed is None:
        state = prepared.state_of(tensors)
        packed = _op("_bcq_pack_cpu")(*_bcq_tensors(*tensors, *parameters[:3]), kind != "words", kind == "bytes")
        prepared.keep(tensors, parameters, state, kind, packed)
    return packed


def _tensors_of(weight: BCQWeight) -> BcqTensors:
    t = weight.tensors
    return weight.codes, weight.scales, t.get("offsets"), t.get("zeros"), t.get("ratios")


def prepare_bcq(weight: BCQWeight, accuracy: int) -> None:
    """Have the layout of `weight` for the look-up kernels of that accuracy, as a call would."""
    kind = _packed_kind(_isa(), accuracy)
    _bcq_packed(_tensors_of(weight), weight.shape[1], weight.group_size, weight.scale_kind, kind)


def _bcq_ready(weight: BCQWeight, algorithm: str, accuracy: int) -> Ready | None:
    """`_bcq_linear_cpu` for calls such as the one that was just made."""
    if algorithm == "dequantize":
        return None
    isa, tensors = _isa(), _tensors_of(weight)
    kind = _packed_kind(isa, accuracy)
    entry = prepared.entry_of(tensors, (weight.shape[1], weight.group_size, weight.scale_kind, tensors[2] is None))
    if entry is None or kind not in entry.layouts:
        return None
    tail = (weight.shape[0], algorithm == "biqgemm", isa, accuracy)
    return Ready(_op("_bcq_linear_cpu"), BCQ_TENSORS, tensors, entry, kind, tail)


def _codebook_packed(tensors: tuple[Tensor, Tensor, Tensor], in_features: int, group_size: int) -> Tensor:
    """The weight of tensors (codes, codebooks, scales) in the layout of the codebook kernels, kept with them."""
    parameters = (in_features, group_size)
    packed = prepared.find(tensors, parameters, CODEBOOK_KIND)
    if packed is None:
        state = prepared.state_of(tensors)
        packed = _op("_codebook_pack_cpu")(*(t.contiguous() for t in tensors), *parameters)
        prepared.keep(tensors, parameters, state, CODEBOOK_KIND, packed)
    return packed


def _codebook_ready(weight: CodebookWeight, algorithm: str, accuracy: int) -> Ready | None:
    """`_codebook_linear_cpu` for calls such as the one that was just made."""
    tensors = (weight.codes, weight.codebooks, weight.scales)
    if algorithm == "dequantize" or not all([tensor.is_contiguous() for tensor in tensors]):  # noqa: C419 (faster)
        return None
    entry = prepared.entry_of(tensors, (weight.shape[1], weight.group_size))
    if entry is None or CODEBOOK_KIND not in entry.layouts:
        return None
    tail = (weight.group_size, _isa(), accuracy)
    names = ("codes", "codebooks", "scales")
    return Ready(_op("_codebook_linear_cpu"), names, tensors, entry, CODEBOOK_KIND, tail)


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
    tensors = (codes, scales, offsets, zeros, ratios)
    if algorithm == "dequantize":
        shape = (x.numel() // in_features, out_features, in_features, group_size, codes.shape[0])
        if _multiplies_tiles(Problem("bcq_linear", "cpu", x.dtype, *shape, scale_kind, accuracy=accuracy)):
            packed = _bcq_packed(tensors, in_features, group_size, scale_kind, _packed_kind(isa, accuracy))
            return _op("_bcq_tile_gemm_cpu")(x, packed, bias, out_features, accuracy)
        record = _bcq_tensors(*tensors, in_features, group_size, scale_kind)

        def rows(begin: int, end: int, dtype: torch.dtype) -> Tensor:
            return _op("_bcq_dequantize_cpu")(*record, begin, end, dtype, isa)

        return _dequantized_linear(x, out_features, bias, rows)
    packed = _bcq_packed(tensors, in_features, group_size, scale_kind, _packed_kind(isa, accuracy))
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
    bcq_ready=_bcq_ready,
    codebook_ready=_codebook_ready,
    misconfigured=_misconfigured,
)
