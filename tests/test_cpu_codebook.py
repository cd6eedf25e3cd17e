"""The CPU codebook operators, called directly: each instruction set of this machine against the format's arithmetic."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from codebook_cases import (
    CASES,
    EXACT,
    VBMI,
    Case,
    check_close,
    dequantize,
    error_bound,
    exact_weight,
    fixed_point_error,
    linear,
    make_weight,
    pack,
    with_tensors,
)

from lutgemm import _native

REASON = _native.load_ops("_C")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

ISA_NAMES = ("scalar", "avx2", "avx512", "avx512vbmi")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOKENS = (0, 1, 2, 3, 8, 17)
ACCURACY_NAMES = ("fast", "accurate", "near-exact", "exact")
KERNELS = ((0, EXACT), (1, EXACT), (2, EXACT), (VBMI, 0), (VBMI, 1), (VBMI, 2), (VBMI, EXACT))
RELATIVE_ERROR = {0: 2e-2, 1: 1e-3, 2: 1e-4, EXACT: 1e-6}


@cache
def runs_here(isa: int) -> bool:
    try:
        dequantize(make_weight(CASES[8]), isa)
    except RuntimeError:
        return False
    return True


@pytest.fixture(params=range(4), ids=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> int:
    if not runs_here(request.param):
        pytest.skip(f"this CPU has no {ISA_NAMES[request.param]}")
    return request.param


@pytest.fixture(params=KERNELS, ids=lambda k: f"{ISA_NAMES[k[0]]}-{ACCURACY_NAMES[k[1]]}")
def kernel(request: pytest.FixtureRequest) -> tuple[int, int]:
    """(instruction set, accuracy) where that is a kernel of its own: all others are exact."""
    if not runs_here(request.param[0]):
        pytest.skip(f"this CPU has no {ISA_NAMES[request.param[0]]}")
    return request.param


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_activations_return_the_weight(case: Case, dtype: torch.dtype, isa: int) -> None:
    weight = make_weight(case)
    y = linear(torch.eye(case.k, dtype=dtype), weight, isa)
    assert torch.equal(y.T, weight.dequantize(dtype))


def test_small_integers_are_exact(case: Case, isa: int) -> None:
    weight = make_weight(case, exact=True)
    packed, dense = pack(weight), exact_weight(weight)
    gen = torch.Generator().manual_seed(0)
    for tokens in TOKENS:
        x = torch.randint(-8, 9, (tokens, case.k), generator=gen).float()
        bias = torch.randint(-8, 9, (case.n,), generator=gen).float()
        expected = x.double() @ dense.T
        assert torch.equal(linear(x, weight, isa, packed=packed).double(), expected)
        assert torch.equal(linear(x, weight, isa, bias, packed).double(), expected + bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_activations_stay_within_the_bound(case: Case, dtype: torch.dtype, isa: int) -> None:
    weight = make_weight(case)
    packed, dense = pack(weight), exact_weight(weight)
    gen = torch.Generator().manual_seed(1)
    for tokens in (1, 3, 7, 17):
        x = torch.randn(tokens, case.k, generator=gen)
        x[:, :: max(1, case.k // 3)] *= 100  # outliers
        x, bias = x.to(dtype), torch.randn(case.n, generator=gen).to(dtype)
        exact = x.double() @ dense.T + bias.double()
        check_close(linear(x, weight, isa, bias, packed), exact, error_bound(x, weight, bias))


def test_bias_is_added_before_the_only_rounding(isa: int) -> None:
    case = Case(1, 4, 8, 64, 256, 64)
    weight = make_weight(case, exact=True)
    x = torch.randint(-200, 201, (3, case.k), generator=torch.Generator().manual_seed(1)).half()
    bias = torch.full((case.n,), 0.75).half()
    without_bias = x.double() @ exact_weight(weight).T
    expected = (without_bias + 0.75).half()
    assert not torch.equal(expected, without_bias.half() + bias)  # rounding twice would show
    assert torch.equal(linear(x, weight, isa, bias), expected)


def test_a_token_does_not_depend_on_its_neighbours(case: Case, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    weight = make_weight(case)
    packed = pack(weight)
    x = torch.randn(23, case.k, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([linear(row[None], weight, isa, None, packed, accuracy) for row in x])
    for tokens in (2, 4, 7, 11, 23):
        assert torch.equal(linear(x[:tokens], weight, isa, None, packed, accuracy), alone[:tokens])


@pytest.mark.parametrize("tokens", [1, 17])
def test_bits_do_not_depend_on_threads_or_runs(case: Case, tokens: int, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    weight = make_weight(case)
    x = torch.randn(tokens, case.k, generator=torch.Generator().manual_seed(3))
    results, packs, rows = [], [], []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        packs.append(pack(weight))
        results.append(linear(x, weight, isa, None, packs[0], accuracy))
        rows.append(dequantize(weight, isa))
    assert all(torch.equal(y, results[0]) for y in results)
    assert all(torch.equal(p, packs[0]) for p in packs)
    assert all(torch.equal(r, rows[0]) for r in rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_accuracy_stays_within_its_bound(case: Case, dtype: torch.dtype, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    exact = accuracy == EXACT or case.bits > 8
    weight = make_weight(case)
    packed, dense = pack(weight), exact_weight(weight)
    gen = torch.Generator().manual_seed(5)
    for tokens in (1, 2, 3, 7, 17):
        x = torch.randn(tokens, case.k, generator=gen)
        x[:, :: max(1, case.k // 3)] *= 100  # outliers
        if tokens == 7:
            x[:] = torch.eye(7, case.k)
        x, bias = x.to(dtype), torch.randn(case.n, generator=gen).to(dtype)
        bound = error_bound(x, weight, bias)
        if not exact:
            bound += fixed_point_error(x, weight, accuracy)
        check_close(linear(x, weight, isa, bias, packed, accuracy), x.double() @ dense.T + bias.double(), bound)


@pytest.mark.parametrize("outliers", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("vec_len", [2, 4, 8, 16])
@pytest.mark.parametrize("num_codebooks", [1, 2, 4])
def test_relative_errors(num_codebooks: int, vec_len: int, outliers: float, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    w = make_weight(Case(num_codebooks, vec_len, 8, 130, 1024, 128))
    smaller = w.codebooks * 0.4 ** torch.arange(num_codebooks)[:, None, None]  # as residuals have them
    w = with_tensors(w, smaller.to(w.codebooks.dtype), w.scales)
    gen = torch.Generator().manual_seed(6)
    x = torch.randn(4, 1024, generator=gen)
    x[:, torch.randperm(1024, generator=gen)[:20]] *= outliers
    exact = x.double() @ exact_weight(w).T
    error = (linear(x, w, isa, None, None, accuracy).double() - exact).norm() / exact.norm()
    assert error <= RELATIVE_ERROR[accuracy]


@pytest.mark.parametrize("power", [-80, 60])
def test_powers_of_two_pass_through(power: int, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    weight = make_weight(Case(2, 4, 8, 130, 256, 64))
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(7))
    scaled = linear(x * 2.0**power, weight, isa, None, None, accuracy)
    assert torch.equal(scaled, linear(x, weight, isa, None, None, accuracy) * 2.0**power)


def test_zeros_give_the_bias(case: Case, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    weight = make_weight(case)
    bias = torch.randn(case.n)
    for tokens in (1, 5):
        y = linear(torch.zeros(tokens, case.k), weight, isa, bias, None, accuracy)
        assert torch.equal(y, bias.expand(tokens, -1))
    nothing = with_tensors(weight, torch.zeros_like(weight.codebooks), weight.scales)
    assert torch.equal(linear(torch.ones(1, case.k), nothing, isa, bias, None, accuracy), bias[None])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(value: float, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    weight = make_weight(Case(2, 4, 8, 70, 100, 20))
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(8))
    expected = linear(x, weight, isa, None, None, accuracy)
    x[1, 33] = value
    y = linear(x, weight, isa, None, None, accuracy)
    assert not y[1].isfinite().any()
    assert torch.equal(y[::2], expected[::2])
    codebooks = weight.codebooks.clone()
    codebooks[1, :, 2] = value
    y = linear(x[:1], with_tensors(weight, codebooks, weight.scales), isa, None, None, accuracy)
    assert not y.isfinite().any()


@pytest.mark.parametrize("case", [case for case in CASES if case.bits > 8], ids=str)
def test_on_no_instruction_set_have_wide_codes_kernels_of_integers(case: Case, isa: int) -> None:
    check_that_every_accuracy_is_exact(case, isa)


@pytest.mark.parametrize("isa", [level for level in range(4) if REASON is None and level != VBMI and runs_here(level)])
def test_without_a_kernel_of_its_own_an_accuracy_is_exact(case: Case, isa: int) -> None:
    check_that_every_accuracy_is_exact(case, isa)


def check_that_every_accuracy_is_exact(case: Case, isa: int) -> None:
    weight = make_weight(case)
    x = torch.randn(3, case.k, generator=torch.Generator().manual_seed(9))
    for level in (0, 1, 2):
        assert torch.equal(linear(x, weight, isa, None, None, level), linear(x, weight, isa))


def test_without_a_pack_the_record_is_read(case: Case, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    w = make_weight(case)
    x = torch.randn(3, case.k, generator=torch.Generator().manual_seed(4))
    y = torch.ops.lutgemm._codebook_linear_cpu(
        x, w.codes, w.codebooks, w.scales, None, None, w.group_size, isa, accuracy
    )
    assert torch.equal(y, linear(x, w, isa, None, None, accuracy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_equals_the_format(case: Case, dtype: torch.dtype, isa: int) -> None:
    weight = make_weight(case)
    expected = weight.dequantize(dtype)
    assert torch.equal(dequantize(weight, isa, dtype), expected)
    begin, end = case.n // 3, case.n - case.n // 4
    assert torch.equal(dequantize(weight, isa, dtype, (begin, end)), expected[begin:end])
    assert dequantize(weight, isa, dtype, (case.n, case.n)).shape == (0, case.k)


@pytest.mark.parametrize("bits", [3, 10])
def test_codes_beyond_the_codebook_stay_inside_it(bits: int, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    w = make_weight(Case(2, 4, bits, 50, 64, 32))
    dtype = w.codes.dtype
    wild = torch.randint(*((0, 256) if bits <= 8 else (-(2**15), 2**15)), w.codes.shape).to(dtype)
    masked = with_tensors(w, w.codebooks, w.scales)
    masked.tensors["codes"] = wild & (2**bits - 1)
    w.tensors["codes"] = wild
    x = torch.randn(5, 64)
    assert torch.equal(linear(x, w, isa, None, None, accuracy), linear(x, masked, isa, None, None, accuracy))
    assert torch.equal(dequantize(w, isa), dequantize(masked, isa))


def test_a_corrupt_pack_is_refused_or_harmless(case: Case, isa: int) -> None:
    weight = make_weight(case)
    packed, x = pack(weight), torch.ones(2, case.k)
    for word in range(16):
        wrong = packed.clone()
        wrong[4 * word] ^= 1
        with pytest.raises(RuntimeError, match="packed: its header"):
            linear(x, weight, isa, packed=wrong)
    for wrong in (packed[:-1].clone(), torch.cat([packed, packed[:1]]), packed[:0], packed[:40].clone()):
        with pytest.raises(RuntimeError, match="packed: its size"):
            linear(x, weight, isa, packed=wrong)
    noise = packed.clone()
    noise[64:] = torch.randint(0, 256, (len(packed) - 64,), dtype=torch.uint8)
    for tokens in (1, 3, 8, 16):
        for level in range(4):
            y = linear(torch.ones(tokens, case.k), weight, isa, None, noise, level)
            assert y.shape == (tokens, case.n)


def test_a_view_of_a_pack_is_read_right_or_refused(isa: int) -> None:
    weight = make_weight(CASES[0])
    packed, x = pack(weight), torch.randn(20, 256)
    for offset in (4, 1):
        view = torch.empty(len(packed) + offset, dtype=torch.uint8)[offset:]
        view.copy_(packed)
        if offset == 4:
            for level in range(4):
                assert torch.equal(
                    linear(x, weight, isa, None, view, level), linear(x, weight, isa, None, packed, level)
                )
        else:
            with pytest.raises(RuntimeError, match="packed: starts at an odd address"):
                linear(x, weight, isa, packed=view)
