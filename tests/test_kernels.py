"""Every case of `lutgemm.testing.cases` on every backend, instruction set and algorithm that this machine has."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import KernelRun

from lutgemm.formats import BCQWeight, CodebookWeight
from lutgemm.testing.cases import CASES, Inputs, OpCase
from lutgemm.testing.numerics import (
    RELATIVE_ERROR,
    UNIT_ROUNDOFF,
    assert_equal,
    assert_within,
    error_bound,
    exact_result,
    rms,
    rounded_allowance,
    torch_allowance,
)

ALL = [case for make in CASES.values() for case in make()]
FULL = [case for case in ALL if case.accuracy == "exact"]
ROUNDED = [case for case in ALL if case.accuracy != "exact"]
EXACT = [case for case in FULL if case.has_tier("exact")]

STATISTICAL = 32
"""Elements from which on the root mean square error of a result means something."""

IDENTITY = [
    OpCase(op=op, N=n, K=k, group_size=g, dtype=dtype, **extra)
    for dtype in ("float32", "float16", "bfloat16")
    for n, k, g in ((20, 100, 32), (65, 64, 0))
    for op, extra in (
        ("bcq_linear", {"bits": 1, "offsets": False}),
        ("bcq_linear", {"bits": 3}),
        ("bcq_linear", {"bits": 4, "scale_kind": "uniform"}),
        ("bcq_linear", {"bits": 3, "scale_kind": "ratio", "scale_dtype": "bfloat16"}),
        ("codebook_linear", {"scale_dtype": "float32"}),
        ("codebook_linear", {"num_codebooks": 2, "vec_len": 8}),
    )
]

STEADY = [
    OpCase(M=m, N=130, K=300, bits=3, group_size=64, op=op, dtype=dtype, bias=True)
    for op in CASES
    for m, dtype in ((1, "float32"), (9, "float32"), (4, "bfloat16"))
]


@cache
def prepared(case: OpCase, tier: str) -> tuple[Inputs, torch.Tensor]:
    """The inputs of a case and its fp64 result, shared by the runs of all targets."""
    inputs = case.inputs(tier)
    return inputs, exact_result(inputs.x, inputs.weight, inputs.bias)


@cache
def limits(case: OpCase, algorithm: str) -> tuple[torch.Tensor, float]:
    """The bound of every element of a random-tier result, and of its root mean square error."""
    inputs, _ = prepared(case, "random")
    return error_bound(inputs.x, inputs.weight, inputs.bias, algorithm), torch_allowance(*vars(inputs).values())


def test_the_exact_tier_covers_nearly_every_case():
    assert len(EXACT) >= 0.95 * len(FULL)
    assert {case.dtype for case in EXACT} == {"float32", "float16", "bfloat16"}


@pytest.mark.cases(EXACT)
def test_exact_tier_is_bit_exact(run: KernelRun):
    inputs, truth = prepared(run.case, "exact")
    assert_equal(run(inputs), truth.to(inputs.x.dtype), str(run))


@pytest.mark.cases(FULL)
def test_random_tier_is_within_its_bounds(run: KernelRun):
    inputs, truth = prepared(run.case, "random")
    kept = inputs.x.clone()
    y = run(inputs)
    assert y.dtype == inputs.x.dtype
    bound, allowed = limits(run.case, run.algorithm)
    assert_within(y, truth, bound, str(run))
    if y.numel() >= STATISTICAL:
        own = rms(y.double() - truth)
        assert own <= allowed, f"{run}: rms error {own:.3e}, twice torch's and its floor are {allowed:.3e}"
    assert torch.equal(inputs.x, kept), "x was written to"


@pytest.mark.cases(ROUNDED)
def test_every_accuracy_keeps_its_error(run: KernelRun):
    inputs, truth = prepared(run.case, "random")
    y = run(inputs)
    assert y.dtype == inputs.x.dtype
    allowed = rounded_allowance(*vars(inputs).values(), run.case.accuracy)
    assert_within(y, truth, float("inf"), str(run))
    own = rms(y.double() - truth)
    assert own <= allowed, f"{run}: rms error {own:.3e}, {run.case.accuracy} allows {allowed:.3e}"


def test_the_least_accuracy_is_not_allowed_everything():
    """The rules tell the accuracies apart: an error of twice one's own limit is refused."""
    case = OpCase(M=16, N=130, K=256, outliers=True, dtype="float32")
    inputs, truth = case.inputs(), exact_result(case.inputs().x, case.inputs().weight)
    for accuracy, relative in RELATIVE_ERROR.items():
        allowed = rounded_allowance(*vars(inputs).values(), accuracy)
        assert 0.5 * relative < allowed / rms(truth) < 2 * relative


@pytest.mark.cases(IDENTITY)
def test_identity_activations_return_the_weight(run: KernelRun):
    """Bit-exact where each weight is a sum of representable parts, and for random data where it is one product."""
    case = replace(run.case, M=run.case.K)
    for tier in ("exact", "random"):
        weight = replace(case, dtype="float32").weight(tier)
        eye = torch.eye(case.K, dtype=case.torch_dtype)
        y = run(Inputs(eye, weight, None))
        expected = weight.dequantize(case.torch_dtype).T
        single = isinstance(weight, CodebookWeight) and weight.layout.num_codebooks == 1
        single |= isinstance(weight, BCQWeight) and weight.bits == 1 and weight.plane_offsets() is None
        if tier == "exact" or single:
            assert_equal(y, expected, f"{run} {tier}")
        else:
            bound = error_bound(eye, weight, None, run.algorithm, depth=2 * (case.bits + case.num_codebooks) + 4)
            assert_within(y, weight.dequantize().T, bound, f"{run} {tier}")


@pytest.mark.cases(EXACT[::5])
def test_a_weight_in_training_gives_the_same_bits(run: KernelRun):
    """Before and after a change of its scales in place."""
    inputs = run.case.inputs("exact")
    inputs.weight.scales.requires_grad_()
    for factor in (1.0, 2.0):
        with torch.no_grad():
            inputs.weight.scales.mul_(factor)
            y, truth = run(inputs), exact_result(inputs.x, inputs.weight, inputs.bias)
        assert_equal(y, truth.to(inputs.x.dtype), str(run))


@pytest.mark.cases(STEADY)
def test_twenty_runs_give_the_same_bits(run: KernelRun):
    inputs = run.case.inputs()
    first = run(inputs)
    for _ in range(19):
        assert_equal(run(inputs), first, str(run))


@pytest.mark.cases([OpCase(op=op, M=m, N=70, K=200, bits=3, group_size=64) for op in CASES for m in (2, 33)])
def test_a_token_does_not_depend_on_its_neighbours(run: KernelRun):
    """NaN and Inf in one token stay in it; the others are what they are without it."""
    inputs = run.case.inputs()
    clean = run(inputs)
    x = inputs.x.clone()
    x[1, 5], x[1, 6] = float("nan"), float("inf")
    y = run(replace(inputs, x=x))
    others = torch.arange(len(x)) != 1
    assert y[1].isnan().all()
    assert_equal(y[others], clean[others], str(run))


@pytest.mark.cases([OpCase(op=op, N=33, K=72, group_size=64, dtype=d) for op in CASES for d in ("float32", "bfloat16")])
def test_inf_in_x_is_not_hidden(run: KernelRun):
    inputs = run.case.inputs()
    x = inputs.x.clone()
    x[0, 3] = float("inf")
    y = run(replace(inputs, x=x))
    assert not torch.isfinite(y[0]).any()
    assert torch.isfinite(y[1:]).all()


@pytest.mark.cases([OpCase(op=op, M=m, N=20, K=100, bits=3) for op in CASES for m in (1, 5)])
def test_what_lies_around_the_tensors_is_not_read(run: KernelRun):
    """Every tensor of the record and x between guards of NaN (or of ones, for codes): the same result."""
    inputs = run.case.inputs("exact")
    expected = run(inputs)

    def guarded(t: torch.Tensor) -> torch.Tensor:
        fill = float("nan") if t.is_floating_point() else -1 if t.dtype != torch.uint8 else 255
        wide = torch.full((t.numel() + 66,), fill, dtype=t.dtype)
        wide[33 : 33 + t.numel()] = t.flatten()
        return wide[33 : 33 + t.numel()].view(t.shape)

    weight = type(inputs.weight)(inputs.weight.layout, {k: guarded(t) for k, t in inputs.weight.tensors.items()})
    assert_equal(run(Inputs(guarded(inputs.x), weight, None)), expected, str(run))


@pytest.mark.cases([OpCase(op=op, M=3, N=20, K=100, dtype=d) for op in CASES for d in ("float32", "float16")])
def test_large_and_tiny_values_survive(run: KernelRun):
    """Scaling x by a power of two scales y by it: no intermediate overflows or flushes to zero."""
    inputs = run.case.inputs("exact")
    for exponent in (-8, 4):
        y = run(replace(inputs, x=inputs.x * 2.0**exponent))
        assert_equal(y, (exact_result(inputs.x, inputs.weight) * 2.0**exponent).to(y.dtype), f"{run} 2**{exponent}")


def test_bounds_are_not_so_wide_that_half_precision_sums_pass():
    """The rules refuse a result whose look-ups were summed in fp16, or whose table entries were."""
    case = OpCase(M=8, N=64, K=256, bits=3)
    inputs = case.inputs()
    sloppy = torch.zeros(case.M, case.N)
    w = inputs.weight.dequantize()
    for k in range(0, case.K, 8):
        sloppy = (sloppy + inputs.x[:, k : k + 8] @ w[:, k : k + 8].T).half().float()
    truth = exact_result(inputs.x, inputs.weight)
    with pytest.raises(AssertionError, match=r"elements outside the bound; worst at \[\d+, \d+\]: actual"):
        assert_within(sloppy, truth, error_bound(inputs.x, inputs.weight, None, "lut_gemm"))
    assert rms(sloppy.double() - truth) > 100 * torch_allowance(inputs.x, inputs.weight, None)


def test_bounds_name_what_is_not_finite_and_what_is_misplaced():
    truth = torch.zeros(2, 3, dtype=torch.float64)
    y = torch.zeros(2, 3)
    y[1, 2] = float("nan")
    with pytest.raises(AssertionError, match=r"1 of 6 elements are not finite, at \[\[1, 2\]\]: \[nan\]"):
        assert_within(y, truth, 1.0)
    with pytest.raises(AssertionError, match=r"shape \[2, 2\], expected \[2, 3\]"):
        assert_within(y[:, :2], truth, 1.0)
    with pytest.raises(AssertionError, match=r"dtype torch.float32, expected torch.float64"):
        assert_equal(torch.zeros(2, 3), truth)
    assert_within(torch.full((2, 3), UNIT_ROUNDOFF[torch.float16]), truth, 2.0**-11)
