"""How far a result may be from the truth: the only place with tolerances.

The truth is fp64: `y = x @ W.T + bias` with W as SPEC.md defines it (fp32). Four rules, none of them a bare rtol.

**Bound**, for every element (`error_bound`). Write A = sum over k of |x| * (sum of the absolute terms of W), the terms
of a BCQ weight being its scales and its offset, those of a codebook weight its scaled centroids. An algorithm may add
the terms separately, so A, not sum |x||W|, is what its rounding scales with. Each number that enters y passes through
at most `depth` fp32 roundings, whatever the order, so to first order (Higham, Accuracy and Stability, 3.1)

    |error| <= depth * 2**-24 * A

`depth` counts the longest chain that a plain sequential loop would have:

    bcq tables        8 (table entry) + bits * ceil(K/8) (all look-ups in one chain) + K (sums of x for the offsets)
    codebook tables   vec_len (inner product) + num_codebooks * ceil(K/vec_len)
    dequantize        K
    always            + 2 * planes * G (a scale and an addition per group and plane) + planes + 4 (W itself, bias)

For a 16-bit result add one rounding of it, u * |y|, u = 2**-11 (fp16) or 2**-8 (bf16), and half the smallest subnormal.
`dequantize` and `dequant_gemm` may work in x's own dtype: their weight is rounded to it, u * sum |x||W|, their product
and its sum with the bias are both rounded, and torch's matmul of that dtype may round partial sums, so they get
3 * u * A more.

**No worse than torch** (`torch_allowance`). The root mean square error is at most twice that of torch's own matmul of
x's dtype on the dequantized weight rounded to that dtype, plus one rounding of y, plus, for fp32, the rounding of the
terms: 2**-24 * sqrt(sum of squared terms), which cancellation between planes and offset costs any table algorithm.

**Exact** (`assert_equal`): the same bits.

**Rounded tables** (`rounded_allowance`), in place of the first two for an accuracy below "exact". Entries of tables
carry a rounding of their own, independent from entry to entry, so the root mean square error is at most
`RELATIVE_ERROR` times what y would be if the signs of all products x * W were random,

    rms of y ~ sqrt(mean over m, n of the sum over k of x**2 * W**2)

which is y's own root mean square for data of the random tier, and does not vanish where a small y cancels; times
1 + 3 / sqrt(2 * M * N), three standard deviations of a root mean square over so few elements; plus `torch_allowance`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import BCQWeight, CodebookWeight, QuantizedWeight
from ..formats.base import row_slabs

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
HALF_SUBNORMAL = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
LUT_WIDTH = 8
DEQUANTIZING = ("dequantize", "dequant_gemm")
"""Algorithms that round a weight to x's dtype and multiply by it."""
RELATIVE_ERROR = {"fast": 2e-2, "accurate": 1e-3, "near-exact": 1e-4}
"""Largest relative L2 error of each accuracy, for normal x with outliers."""


def exact_result(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """fp64 `[M, N]`: the truth. W is dequantized in slabs of rows, so that large layers fit in memory."""
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float64, device=x.device)
    wide = x.to(torch.float64)
    for rows in row_slabs(weight.shape[0], 8 * weight.shape[1]):
        y[:, rows] = wide @ weight.dequantize(rows=rows).to(torch.float64).T
    return y if bias is None else y + bias.to(torch.float64)


def absolute_weight(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight whose elements are the sums of the absolute terms of `weight`'s elements."""
    k, group_size = weight.shape[1], weight.group_size
    if isinstance(weight, CodebookWeight):
        return CodebookWeight.build(
            weight.codes, weight.codebooks.abs(), weight.scales.abs(), in_features=k, group_size=group_size
        )
    assert isinstance(weight, BCQWeight)
    offsets = weight.plane_offsets()
    total = weight.plane_scales().to(torch.float32).abs().sum(0)
    if offsets is not None:
        total = total + offsets.to(torch.float32).abs()
    return BCQWeight.build(
        torch.zeros_like(weight.codes[:1]), -total.unsqueeze(0), in_features=k, group_size=group_size
    )


def absolute_terms(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """fp64 A `[M, N]` of this module's docstring."""
    return exact_result(x.abs(), absolute_weight(weight))


def accumulation_depth(weight: QuantizedWeight, algorithm: str) -> int:
    """`depth` of this module's docstring."""
    k, groups = weight.shape[1], weight.layout.num_groups
    if isinstance(weight, BCQWeight):
        planes = weight.bits
        tables = LUT_WIDTH + planes * -(-k // LUT_WIDTH) + k
    else:
        assert isinstance(weight, CodebookWeight)
        planes = weight.layout.num_codebooks
        tables = weight.vec_len + planes * -(-k // weight.vec_len)
    longest = k if algorithm in DEQUANTIZING else tables
    return longest + 2 * planes * groups + planes + 4


def error_bound(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, algorithm: str, depth: int | None = None
) -> Tensor:
    """fp64 `[M, N]`: the largest error that a correct result may have; `depth` replaces the derived one."""
    terms = absolute_terms(x, weight)
    if bias is not None:
        terms = terms + bias.to(torch.float64).abs()
    depth = accumulation_depth(weight, algorithm) if depth is None else depth
    bound = depth * UNIT_ROUNDOFF[torch.float32] * terms + HALF_SUBNORMAL[x.dtype]
    if x.dtype != torch.float32:
        u = UNIT_ROUNDOFF[x.dtype]
        bound = bound + u * (exact_result(x, weight, bias).abs() + bound)
        if algorithm in DEQUANTIZING:
            bound = bound + 3 * u * terms + HALF_SUBNORMAL[x.dtype] * x.to(torch.float64).abs().sum(1, keepdim=True)
    return bound


@dataclass(frozen=True)
class Mismatch:
    """Where a result is furthest outside its bound, as a message for a person."""

    message: str

    def __str__(self) -> str:
        return self.message


def _position(flat: Tensor, shape: torch.Size) -> list[int]:
    return [int(i) for i in torch.unravel_index(flat, shape)]


def mismatch(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str = "") -> Mismatch | None:
    """None when `|actual - expected| <= bound` everywhere and nothing is NaN or Inf; else what is worst, and where."""
    if actual.shape != expected.shape:
        return Mismatch(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    if not actual.numel():
        return None
    found, truth = actual.detach().to(torch.float64), expected.detach().to(torch.float64)
    same = (found == truth) | (found.isnan() & truth.isnan())
    bad = ~torch.isfinite(found) & ~same
    if bad.any():
        places = bad.nonzero()
        listed = [p.tolist() for p in places[:4]]
        values = [float(found[tuple(p)]) for p in places[:4]]
        return Mismatch(f"{what}: {len(places)} of {found.numel()} elements are not finite, at {listed}: {values}")
    limit = torch.as_tensor(bound, dtype=torch.float64).expand_as(found)
    error = torch.where(same, torch.zeros_like(found), (found - truth).abs())
    outside = ~(error <= limit)  # a truth or a bound that is NaN is outside too
    if not outside.any():
        return None
    ratio = error / limit.clamp(min=torch.finfo(torch.float64).tiny)
    worst = _position(ratio.argmax(), found.shape)
    at = tuple(worst)
    return Mismatch(
        f"{what}: {int(outside.sum())} of {found.numel()} elements outside the bound; worst at {worst}: "
        f"actual {float(found[at])!r}, expected {float(truth[at])!r}, error {float(error[at]):.3e}, "
        f"bound {float(limit[at]):.3e}"
    )


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str = "") -> None:
    """Fail with the worst coordinate unless `mismatch` finds nothing."""
    if found := mismatch(actual, expected, bound, what):
        raise AssertionError(str(found))


def assert_equal(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Fail unless every element is equal and the dtypes are (so the same bits, but for the sign of a zero)."""
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{what}: dtype {actual.dtype}, expected {expected.dtype}")
    assert_within(actual, expected, 0.0, what)


def check_result(
    actual: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, algorithm: str
) -> Mismatch | None:
    """The bound of this module on a result of `algorithm`: None, or what is wrong."""
    truth = exact_result(x, weight, bias)
    return mismatch(actual, truth, error_bound(x, weight, bias, algorithm), algorithm)


def rms(values: Tensor) -> float:
    """Root mean square, in fp64; 0 for no elements."""
    return float(values.to(torch.float64).square().mean().sqrt()) if values.numel() else 0.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error, in fp64; 0 when both are 0."""
    norm = rms(expected)
    error = rms(actual.to(torch.float64) - expected.to(torch.float64))
    return error / norm if norm else error


def torch_result(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """torch's own matmul in x's dtype on the dequantized weight."""
    return torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias)


def torch_allowance(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> float:
    """The most root mean square error that the rule "no worse than torch" allows; 0 for no elements."""
    truth = exact_result(x, weight, bias)
    allowed = 2 * rms(torch_result(x, weight, bias).to(torch.float64) - truth) + UNIT_ROUNDOFF[x.dtype] * rms(truth)
    if x.dtype == torch.float32 and truth.numel():
        squares = absolute_weight(weight).dequantize().to(torch.float64).square()
        allowed += UNIT_ROUNDOFF[torch.float32] * float((x.to(torch.float64).square() @ squares.T).mean().sqrt())
    return allowed


def rounded_allowance(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, accuracy: str) -> float:
    """The most root mean square error that an accuracy below "exact" allows; 0 for no elements."""
    if not x.shape[0]:
        return 0.0
    squares = weight.dequantize().to(torch.float64).square()
    expected = float((x.to(torch.float64).square() @ squares.T).mean().sqrt())
    sampling = 1 + 3 / (2 * x.shape[0] * weight.shape[0]) ** 0.5
    return RELATIVE_ERROR[accuracy] * expected * sampling + torch_allowance(x, weight, bias)
