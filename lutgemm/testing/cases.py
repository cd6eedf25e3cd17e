"""Every case that a kernel must pass, listed once. Tests and benchmarks iterate it over every registered backend.

A case is parameters only; `inputs(tier)` makes its tensors, without a quantizer, in one of two tiers:

- "random": normal activations, weights shaped like a quantizer's output. Compared under `numerics.error_bound`.
- "exact": small-integer activations, power-of-two scales and small-integer centroids. Every product and every partial
  sum, in any order and through any table, is a multiple of `EXACT_UNIT` below 2**24 of them, hence an fp32 number; for
  fp16 and bf16 results the sums of x * W + bias are also multiples of the weights' unit below 2**11 and 2**8 of them,
  hence numbers of that dtype. Any order of summation then gives the same bits. `inputs` asserts these bounds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..accuracy import ACCURACIES, resolve_accuracy
from ..backends import Problem
from ..errors import ArgumentError
from ..formats import BCQLayout, BCQWeight, CodebookLayout, CodebookWeight, QuantizedWeight
from ..formats.bcq import ZEROS_DTYPES, pack_bits
from .numerics import absolute_terms

TIERS = ("random", "exact")
OPS = ("bcq_linear", "codebook_linear")

EXACT_UNIT = 0.25
"""Every term of the exact tier is a multiple of this: the least scale, 0.5, times the half-integers of uniform BCQ."""
EXACT_DIGITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Significant bits: every integer up to 2**digits is a number of the dtype."""

GUARD = 17
"""Elements of NaN on each side of an "unaligned" x; odd, so that x does not start at an aligned address either."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case: x `[M, K]`, a weight of N x K, bias `[N]` or None."""

    x: Tensor
    weight: QuantizedWeight
    bias: Tensor | None


@dataclass(frozen=True)
class OpCase:
    """One call of one op. Fields that the op's format does not have are left at their defaults."""

    op: str = "bcq_linear"
    M: int = 3
    N: int = 20
    K: int = 72
    bits: int = 2
    scale_kind: str = "free"
    offsets: bool = True
    zeros_dtype: str = "uint8"
    num_codebooks: int = 1
    vec_len: int = 4
    codebook_bits: int = 6
    group_size: int = 32
    """A number, or 0 for one group per row (K)."""
    dtype: str = "float32"
    scale_dtype: str = "float16"
    bias: bool = False
    x_layout: str = "contiguous"
    """"contiguous", "transposed" (column-major), "strided" (every other column), "unaligned" (between NaN guards)"""
    outliers: bool = False
    """A few columns of x are 100 times the others (random tier)."""
    accuracy: str = "exact"
    """What the call asks for; the exact tier is for "exact" only."""
    seed: int = 0

    @property
    def name(self) -> str:
        """Shape, then every field that differs from its default: the id of the case in tests."""
        shown = {"op", "M", "N", "K"}
        extra = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in shown and getattr(self, f.name) != f.default
        ]
        return "-".join([self.op.removesuffix("_linear"), f"{self.M}x{self.N}x{self.K}", *extra])

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[self.dtype]

    @property
    def layout(self) -> BCQLayout | CodebookLayout:
        """The weight's layout. Raises `ArgumentError` for parameters that SPEC.md does not allow."""
        group_size = self.group_size or self.K
        if self.op == "codebook_linear":
            codebook = (self.num_codebooks, self.vec_len, self.codebook_bits)
            return CodebookLayout(self.N, self.K, *codebook, group_size, self.scale_dtype)
        if self.op != "bcq_linear":
            raise ArgumentError(f"op={self.op!r} is unknown; use one of {list(OPS)}")
        return BCQLayout(
            out_features=self.N,
            in_features=self.K,
            bits=self.bits,
            group_size=group_size,
            scale_kind=self.scale_kind,
            has_offsets=self.offsets and self.scale_kind != "uniform",
            scale_dtype=self.scale_dtype,
            zeros_dtype=self.zeros_dtype,
        )

    def problem(self, device: str) -> Problem:
        """What a backend is asked about a call of this case on a device type."""
        shape = (self.M, self.N, self.K, self.group_size or self.K)
        level = resolve_accuracy(self.accuracy)
        if self.op == "bcq_linear":
            return Problem(self.op, device, self.torch_dtype, *shape, self.bits, self.scale_kind, accuracy=level)
        codebook = (self.num_codebooks, "", self.vec_len, self.codebook_bits)
        return Problem(self.op, device, self.torch_dtype, *shape, *codebook, level)

    def weight(self, tier: str = "random") -> QuantizedWeight:
        """A weight of this layout, the same for the same case and tier."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        layout = self.layout
        if isinstance(layout, CodebookLayout):
            return _codebook_weight(layout, tier, generator)
        return _bcq_weight(layout, tier, generator)

    def inputs(self, tier: str = "random") -> Inputs:
        """x, weight and bias. Raises `ArgumentError` when the tier is "exact" and dtype is too narrow for it."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        weight = self.weight(tier)
        if tier == "exact":
            bias = torch.randint(-2, 3, (self.N,), generator=generator).float() if self.bias else None
            x = self._exact_x(weight, bias, generator)
            _assert_exact(x, weight, bias, self.torch_dtype)
        else:
            bias = torch.randn(self.N, generator=generator) if self.bias else None
            x = torch.randn(self.M, self.K, generator=generator)
            if self.outliers:
                x[:, torch.randperm(self.K, generator=generator)[: max(1, self.K // 50)]] *= 100
        x = laid_out(x.to(self.torch_dtype), self.x_layout)
        return Inputs(x, weight, None if bias is None else bias.to(self.torch_dtype))

    def _exact_x(self, weight: QuantizedWeight, bias: Tensor | None, generator: torch.Generator) -> Tensor:
        """fp32: dense integers -4..4. Narrower: as many entries of +-1 per row as the dtype's digits allow."""
        if self.torch_dtype == torch.float32:
            return torch.randint(-4, 5, (self.M, self.K), generator=generator).float()
        w = weight.dequantize()
        room = 2 ** EXACT_DIGITS[self.torch_dtype] * _unit(w) - (0 if bias is None else float(bias.abs().max()))
        count = min(self.K, int(room / float(w.abs().max().clamp(min=_unit(w)))))
        if count < 1:
            raise ArgumentError(f"{self.name}: {self.dtype} has too few digits for the exact tier")
        order = torch.rand(self.M, self.K, generator=generator).argsort(dim=1)
        signs = torch.randint(0, 2, (self.M, self.K), generator=generator).float() * 2 - 1
        return torch.where(order < count, signs, torch.zeros(()))

    def has_tier(self, tier: str) -> bool:
        """Whether `inputs(tier)` can be made, and what it demands is asked for."""
        if tier == "exact":
            if self.accuracy != "exact":
                return False
            try:
                self.inputs(tier)
            except ArgumentError:
                return False
        return True


def _unit(w: Tensor) -> float:
    """The largest power of two, at most 0.5, of which every element of w is a multiple (0.5 or 0.25 here)."""
    return 0.5 if bool((w * 2 == (w * 2).round()).all()) else EXACT_UNIT


def _assert_exact(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
    """The bounds in this module's docstring."""
    w = weight.dequantize()
    added = 0.0 if bias is None else bias.abs()
    terms = (absolute_terms(x, weight) + added) / EXACT_UNIT
    assert (w / EXACT_UNIT == (w / EXACT_UNIT).round()).all(), "a weight is no multiple of the unit"
    assert not terms.numel() or terms.max() <= 2**24, f"sums reach {terms.max()} units, fp32 holds 2**24"
    if dtype != torch.float32:
        sums = (x.abs() @ w.abs().T + added) / _unit(w)
        digits = EXACT_DIGITS[dtype]
        assert not sums.numel() or sums.max() <= 2**digits, f"sums reach {sums.max()} units, {dtype} holds 2**{digits}"


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x `[M, K]` with other strides or another start."""
    m, k = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided":
        wide = torch.full((m, 2 * k), float("nan"), dtype=x.dtype, device=x.device)
        wide[:, ::2] = x
        return wide[:, ::2]
    if layout == "unaligned":
        guarded = torch.full((m * k + 2 * GUARD,), float("nan"), dtype=x.dtype, device=x.device)
        guarded[GUARD : GUARD + m * k] = x.flatten()
        return guarded[GUARD : GUARD + m * k].view(m, k)
    raise ArgumentError(f"x_layout={layout!r} is unknown; use contiguous, transposed, strided or unaligned")


def _choice(values: Iterable[float], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    table = torch.tensor(list(values))
    return table[torch.randint(0, len(table), shape, generator=generator)]


def _bcq_weight(layout: BCQLayout, tier: str, generator: torch.Generator) -> BCQWeight:
    n, k, bits, g = layout.out_features, layout.in_features, layout.bits, layout.num_groups
    free = layout.scale_kind == "free"
    planes = bits if free else 1
    words = torch.randint(0, 256, (bits, n, -(-k // 32) * 4), generator=generator, dtype=torch.uint8).view(torch.int32)
    words = words & pack_bits(torch.ones(k, dtype=torch.uint8))
    offsets = zeros = ratios = None
    if tier == "exact":
        scales = _choice((0.5, 1.0, -1.0) if free else (0.5, 1.0), (planes, n, g), generator)
        offsets = _choice((-1.0, -0.5, 0.0, 0.5, 1.0), (n, g), generator)
        ratios = torch.tensor([1.0, 2.0] * 4)[:bits]
    else:
        place = 2.0 ** -torch.arange(planes)[:, None, None]
        scales = (torch.rand(planes, n, g, generator=generator) + 0.5) * place / k**0.5
        if layout.scale_kind == "uniform":
            scales *= 2.0 ** (1 - bits)
        offsets = torch.randn(n, g, generator=generator) * 0.2 / k**0.5
        ratios = (torch.rand(bits, generator=generator) + 0.5) * 2.0 ** -torch.arange(bits)
    if layout.scale_kind == "uniform":
        zeros = torch.randint(0, 2**bits, (n, g), generator=generator).to(ZEROS_DTYPES[layout.zeros_dtype])
    dtype = layout.specs()["scales"].dtype
    return BCQWeight.build(
        words,
        scales.to(dtype),
        in_features=k,
        group_size=layout.group_size,
        scale_kind=layout.scale_kind,
        offsets=offsets.to(dtype) if layout.has_offsets else None,
        zeros=zeros,
        ratios=ratios if layout.scale_kind == "ratio" else None,
    )


def _codebook_weight(layout: CodebookLayout, tier: str, generator: torch.Generator) -> CodebookWeight:
    specs = layout.specs()
    codes_spec, books_spec, scales_spec = specs["codes"], specs["codebooks"], specs["scales"]
    codes = torch.randint(0, 2**layout.codebook_bits, codes_spec.shape, generator=generator).to(codes_spec.dtype)
    if tier == "exact":
        codebooks = torch.randint(-3, 4, books_spec.shape, generator=generator).float()
        scales = _choice((0.5, 1.0), scales_spec.shape, generator)
    else:
        codebooks = torch.randn(books_spec.shape, generator=generator)
        scales = (torch.rand(scales_spec.shape, generator=generator) + 0.5) / layout.in_features**0.5
    return CodebookWeight.build(
        codes,
        codebooks.to(books_spec.dtype),
        scales.to(scales_spec.dtype),
        in_features=layout.in_features,
        group_size=layout.group_size,
    )


# The lists. Every value of every axis appears at least once beside the defaults; a seeded mix crosses them.

TOKENS = (0, 1, 2, 3, 7, 8, 16, 33, 128)
OUT_FEATURES = (1, 7, 16, 31, 64, 65, 130)
IN_FEATURES = (1, 5, 8, 31, 32, 33, 64, 100, 256, 300)
DTYPES = ("float32", "float16", "bfloat16")
X_LAYOUTS = ("contiguous", "transposed", "strided", "unaligned")
SCALE_KINDS = ("free", "uniform", "ratio")
MIXED_CASES = 40

ROUNDED = tuple(name for name in ACCURACIES if name != "exact")
ROUNDED_SHAPES = ((1, 300, 1100), (3, 65, 300), (16, 130, 256), (33, 31, 100), (1, 7, 33), (2, 1, 1))
"""M, N, K that every accuracy below "exact" is run on."""


def _unique(cases: Iterable[OpCase]) -> list[OpCase]:
    return list(dict.fromkeys(cases))


def _common(base: OpCase) -> list[OpCase]:
    """The axes that both formats have, each varied alone."""
    cases = [replace(base, M=m) for m in TOKENS]
    cases += [replace(base, N=n) for n in OUT_FEATURES]
    cases += [replace(base, K=k) for k in IN_FEATURES]
    cases += [replace(base, dtype=d, scale_dtype=s, bias=True) for d in DTYPES for s in DTYPES]
    cases += [replace(base, x_layout=layout, dtype=d, K=100) for layout in X_LAYOUTS for d in DTYPES]
    cases += [replace(base, outliers=True, dtype=d, K=300) for d in DTYPES]
    cases += [replace(base, group_size=g, K=300) for g in (32, 64, 128, 0, 1024)]
    cases += [replace(base, M=m, N=300, K=1100, group_size=128, bias=True) for m in (1, 17)]
    return cases


def _rounded(base: OpCase) -> list[OpCase]:
    """The accuracies below "exact": outliers in x, and the shapes around the blocks of kernels."""
    wide = replace(base, outliers=True, group_size=64)
    return [replace(wide, accuracy=a, M=m, N=n, K=k) for a in ROUNDED for m, n, k in ROUNDED_SHAPES]


def _mix(base: OpCase, axes: dict[str, tuple[Any, ...]], accept: Callable[[OpCase], bool]) -> list[OpCase]:
    """Seeded draws from the full product of `axes`."""
    draw = random.Random(base.op)
    cases: list[OpCase] = []
    while len(cases) < MIXED_CASES:
        case = replace(base, seed=len(cases), **{name: draw.choice(values) for name, values in axes.items()})
        if accept(case):
            cases.append(case)
    return cases


_COMMON_AXES: dict[str, tuple[Any, ...]] = {
    "M": (1, 2, 7, 16, 33),
    "N": OUT_FEATURES,
    "K": IN_FEATURES,
    "dtype": DTYPES,
    "scale_dtype": DTYPES,
    "bias": (False, True),
    "x_layout": X_LAYOUTS,
    "outliers": (False, True),
    "group_size": (32, 64, 128, 0),
}


def bcq_cases() -> list[OpCase]:
    """Cases of `bcq_linear`."""
    base = OpCase()
    cases = _common(base)
    cases += [replace(base, bits=b, scale_kind=kind, K=100) for b in range(1, 9) for kind in SCALE_KINDS]
    cases += [replace(base, bits=b, offsets=False, bias=True) for b in range(1, 9)]
    cases += [replace(base, scale_kind="ratio", offsets=False), replace(base, bias=True, offsets=False)]
    cases += [replace(base, scale_kind="uniform", bits=4, zeros_dtype=z, bias=True) for z in ZEROS_DTYPES]
    axes = _COMMON_AXES | {"bits": tuple(range(1, 9)), "scale_kind": SCALE_KINDS, "offsets": (False, True)}
    cases += _rounded(replace(base, bits=3, bias=True))
    cases += [replace(base, M=m, K=300, bits=4, scale_kind="uniform", accuracy=a) for a in ROUNDED for m in (1, 16)]
    cases += [replace(base, M=3, K=300, bits=b, accuracy=a) for a in ROUNDED for b in (1, 8)]
    cases += [replace(base, M=3, K=300, dtype=d, accuracy=a) for a in ROUNDED for d in DTYPES[1:]]
    return _unique(cases + _mix(base, axes, lambda case: case.M * case.bits * case.K < 2**15))


def codebook_cases() -> list[OpCase]:
    """Cases of `codebook_linear`."""
    base = OpCase(op="codebook_linear")
    cases = _common(base)
    cases += [replace(base, codebook_bits=b, K=100) for b in range(1, 13)]
    cases += [replace(base, num_codebooks=c, vec_len=v, K=100) for c in range(1, 5) for v in (2, 4, 8, 16)]
    cases += [replace(base, num_codebooks=c, vec_len=v, codebook_bits=8, K=200) for c, v in ((1, 4), (1, 8), (2, 8))]
    cases += [replace(base, vec_len=v, group_size=v, K=33) for v in (2, 4, 8, 16)]
    cases += _rounded(replace(base, codebook_bits=8, bias=True))
    cases += [replace(base, M=m, K=300, num_codebooks=2, vec_len=8, accuracy=a) for a in ROUNDED for m in (1, 16)]
    cases += [replace(base, M=3, K=300, codebook_bits=b, accuracy=a) for a in ROUNDED for b in (4, 10)]
    cases += [replace(base, M=3, K=300, dtype=d, accuracy=a) for a in ROUNDED for d in DTYPES[1:]]
    axes = _COMMON_AXES | {"num_codebooks": (1, 2, 3, 4), "vec_len": (2, 4, 8, 16), "codebook_bits": (1, 4, 7, 8, 9)}

    def small(case: OpCase) -> bool:
        """The reference's Psumbook has M * num_codebooks * K / vec_len * 2**codebook_bits entries."""
        return case.M * case.num_codebooks * case.K // case.vec_len * 2**case.codebook_bits < 2**21

    return _unique(cases + _mix(base, axes, small))


CASES: dict[str, Callable[[], list[OpCase]]] = {"bcq_linear": bcq_cases, "codebook_linear": codebook_cases}
"""Op -> its list of cases."""
