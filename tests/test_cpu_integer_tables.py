"""The BCQ kernels of integer tables (`csrc/cpu/byte_*`): what accuracy below "exact" promises beyond its error."""

from __future__ import annotations

import pytest
import torch
from integer_bounds import look_up_width, per_span_bound
from torch import Tensor

from lutgemm.accuracy import ACCURACIES
from lutgemm.backends import cpu
from lutgemm.formats import BCQWeight
from lutgemm.testing.cases import OpCase

ISAS = [name for name in cpu.available_isas() if name != "scalar"]
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU or installation has no kernels of integer tables")

ROUNDED = [name for name in ACCURACIES if name != "exact"]
ALGORITHMS = ("lut_gemm", "biqgemm")
N, K = 1100, 300
"""17 row blocks of 64 and one of 12: two whole chunks of 8 and part of a third."""


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def weight(bits: int = 3, k: int = K, group_size: int = 64, n: int = N, **kind: object) -> BCQWeight:
    made = OpCase(N=n, K=k, bits=bits, group_size=group_size, **kind).weight()
    assert isinstance(made, BCQWeight)
    return made


def packed(w: BCQWeight, isa: str) -> Tensor:
    record = (w.codes, w.scales, w.offsets, w.zeros, w.shape[1], w.group_size, w.scale_kind == "uniform")
    return torch.ops.lutgemm._bcq_pack_cpu(*record, True, isa == "avx512vbmi")


def run(x: Tensor, w: BCQWeight, isa: str, algorithm: str, accuracy: str) -> Tensor:
    choice = (algorithm == "biqgemm", cpu.ISAS.index(isa), ACCURACIES.index(accuracy))
    return torch.ops.lutgemm._bcq_linear_cpu(x, packed(w, isa), None, w.shape[0], *choice)


def activations(tokens: int, k: int = K) -> Tensor:
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("accuracy", ROUNDED)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_token_does_not_depend_on_its_neighbours(isa: str, algorithm: str, accuracy: str):
    w, x = weight(), activations(37)
    together = run(x, w, isa, algorithm, accuracy)
    assert torch.equal(together, torch.cat([run(row[None], w, isa, algorithm, accuracy) for row in x]))


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("accuracy", ROUNDED)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_threads_do_not_change_a_bit(isa: str, algorithm: str, accuracy: str, tokens: int):
    w, x = weight(n=4133, k=1000), activations(tokens, 1000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(x, w, isa, algorithm, accuracy)
        torch.set_num_threads(3)
        assert all(torch.equal(run(x, w, isa, algorithm, accuracy), one) for _ in range(5))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("group_size", [32, 64, 128, 320, "row"])
@pytest.mark.parametrize("accuracy", ROUNDED)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_element_is_within_its_derived_bound(isa: str, algorithm: str, accuracy: str, group_size: int | str):
    k = 1000
    w = weight(bits=2, k=k, n=200, group_size=k if group_size == "row" else group_size, offsets=False)
    x = activations(6, k)
    x[:, ::61] *= 50
    width = look_up_width(isa, algorithm, accuracy)
    error = (run(x, w, isa, algorithm, accuracy).double() - x.double() @ w.dequantize().double().T).abs()
    rounding = 2.0**-18 * (x.abs() @ w.dequantize().abs().T).double()
    assert (error <= per_span_bound(x, w, width, accuracy) + rounding).all()


@pytest.mark.parametrize("accuracy", ROUNDED)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_zeros_and_padding_count_for_nothing(isa: str, algorithm: str, accuracy: str):
    w = weight(k=130, group_size=32, offsets=False)
    assert not run(torch.zeros(3, 130), w, isa, algorithm, accuracy).any()
    assert not run(torch.full((3, 130), 1e-45), w, isa, algorithm, accuracy).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("accuracy", ROUNDED)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_not_finite_stays_in_its_token_and_shows(isa: str, algorithm: str, accuracy: str, value: float):
    w, x = weight(), activations(5)
    clean = run(x, w, isa, algorithm, accuracy)
    x[2, 77] = value
    y = run(x, w, isa, algorithm, accuracy)
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("accuracy", ROUNDED)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_size_of_x_does_not_matter(isa: str, algorithm: str, accuracy: str, scale: float):
    w, x = weight(), activations(4)
    scaled = run(x * scale, w, isa, algorithm, accuracy).double() / scale
    plain = run(x, w, isa, algorithm, accuracy).double()
    limit = {"fast": 2e-2, "accurate": 1e-3, "near-exact": 1e-4}[accuracy]
    assert (scaled - plain).norm() <= limit * plain.norm()


def test_accuracies_are_ordered(isa: str):
    w, x = weight(k=1000, n=200), activations(8, 1000)
    truth = x.double() @ w.dequantize().double().T
    errors = [(run(x, w, isa, "lut_gemm", accuracy).double() - truth).norm() for accuracy in ROUNDED]
    assert errors[0] > 10 * errors[1] > 20 * errors[2] > 0


@pytest.mark.skipif("avx512" not in ISAS, reason="this CPU has no AVX-512")
@pytest.mark.parametrize("accuracy", ["fast", "near-exact"])
def test_avx2_and_avx512_give_the_same_bits(accuracy: str):
    w, x = weight(), activations(5)
    assert torch.equal(run(x, w, "avx2", "lut_gemm", accuracy), run(x, w, "avx512", "lut_gemm", accuracy))


def test_codes_of_another_kernel_are_refused(isa: str):
    w, folded = weight(), isa == "avx512vbmi"
    record = (w.codes, w.scales, w.offsets, w.zeros, w.shape[1], w.group_size, False)
    other = torch.ops.lutgemm._bcq_pack_cpu(*record, True, not folded)
    with pytest.raises(RuntimeError, match="codes are plain" if folded else "codes are folded"):
        torch.ops.lutgemm._bcq_linear_cpu(activations(1), other, None, w.shape[0], False, cpu.ISAS.index(isa), 1)
    with pytest.raises(RuntimeError, match="isa=0 was asked for"):
        torch.ops.lutgemm._bcq_linear_cpu(activations(1), other, None, w.shape[0], False, 0, 1)
    other[52] = 2
    with pytest.raises(RuntimeError, match="unknown kind of codes"):
        torch.ops.lutgemm._bcq_linear_cpu(activations(1), other, None, w.shape[0], False, cpu.ISAS.index(isa), 1)
