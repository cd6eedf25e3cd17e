"""The BCQ kernels of integer tables (`csrc/cpu/byte_*`): what accuracy below "exact" promises beyond its error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lutgemm.accuracy import ACCURACIES
from lutgemm.backends import cpu
from lutgemm.formats import BCQWeight
from lutgemm.testing.cases import OpCase

pytestmark = pytest.mark.skipif(
    "avx512vbmi" not in cpu.available_isas(), reason="this CPU or installation has no AVX-512 VBMI kernels"
)

ROUNDED = [name for name in ACCURACIES if name != "exact"]
ALGORITHMS = ("lut_gemm", "biqgemm")
N, K = 1100, 300
"""17 row blocks of 64 and one of 12: two whole chunks of 8 and part of a third."""


def weight(bits: int = 3, k: int = K, group_size: int = 64, n: int = N, **kind: object) -> BCQWeight:
    made = OpCase(N=n, K=k, bits=bits, group_size=group_size, **kind).weight()
    assert isinstance(made, BCQWeight)
    return made


def packed(w: BCQWeight) -> Tensor:
    tensors = (w.codes, w.scales, w.offsets, w.zeros)
    return torch.ops.lutgemm._bcq_pack_cpu(*tensors, w.shape[1], w.group_size, w.scale_kind == "uniform", True)


def run(x: Tensor, w: BCQWeight, algorithm: str, accuracy: str) -> Tensor:
    level = ACCURACIES.index(accuracy)
    return torch.ops.lutgemm._bcq_linear_cpu(x, packed(w), None, w.shape[0], algorithm == "biqgemm", 3, level)


def activations(tokens: int, k: int = K) -> Tensor:
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("accuracy", ROUNDED)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_token_does_not_depend_on_its_neighbours(algorithm: str, accuracy: str):
    w, x = weight(), activations(37)
    together = run(x, w, algorithm, accuracy)
    assert torch.equal(together, torch.cat([run(row[None], w, algorithm, accuracy) for row in x]))


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("accuracy", ROUNDED)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_threads_do_not_change_a_bit(algorithm: str, accuracy: str, tokens: int):
    w, x = weight(n=4133, k=1000), activations(tokens, 1000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(x, w, algorithm, accuracy)
        torch.set_num_threads(3)
        assert all(torch.equal(run(x, w, algorithm, accuracy), one) for _ in range(5))
    finally:
        torch.set_num_threads(before)


def per_span_bound(x: Tensor, w: BCQWeight, width: int, algorithm: str, accuracy: str) -> Tensor:
    """|error| of y `[M, N]` by `byte_kernels.h`: look-ups * step / 2 of every span, times the sum of its |scales|."""
    group, total = min(w.group_size, w.shape[1]), torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    scales = w.scales.double().abs().sum(0)
    for start in range(0, w.shape[1], group):
        for first in range(start, min(start + group, w.shape[1]), 128):
            part = x[:, first : min(first + 128, start + group)].double().abs()
            slices = -(-part.shape[1] // 8)
            look_ups = slices if width == 8 else slices // 3 * 4 + (slices % 3 + 1 if slices % 3 else 0)
            padded = torch.nn.functional.pad(part, (0, look_ups * width - part.shape[1]))
            largest = padded.view(len(x), look_ups, width).sum(-1).amax(-1)
            steps = {
                "fast": largest / (128 - 1 / 16),
                "accurate": padded.sum(-1) / (32767 - look_ups),
                "near-exact": largest / (32768 - 1 / 16),
            }
            step = steps["accurate" if algorithm == "biqgemm" and accuracy == "fast" else accuracy]
            total += (look_ups * step / 2)[:, None] * scales[:, start // group]
    return total


@pytest.mark.parametrize("group_size", [32, 64, 128, 320, "row"])
@pytest.mark.parametrize("accuracy", ROUNDED)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_element_is_within_its_derived_bound(algorithm: str, accuracy: str, group_size: int | str):
    k = 1000
    w = weight(bits=2, k=k, n=200, group_size=k if group_size == "row" else group_size, offsets=False)
    x = activations(6, k)
    x[:, ::61] *= 50
    width = 6 if algorithm == "biqgemm" and accuracy != "near-exact" else 8
    error = (run(x, w, algorithm, accuracy).double() - x.double() @ w.dequantize().double().T).abs()
    rounding = 2.0**-18 * (x.abs() @ w.dequantize().abs().T).double()
    assert (error <= per_span_bound(x, w, width, algorithm, accuracy) + rounding).all()


@pytest.mark.parametrize("accuracy", ROUNDED)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_zeros_and_padding_count_for_nothing(algorithm: str, accuracy: str):
    w = weight(k=130, group_size=32, offsets=False)
    assert not run(torch.zeros(3, 130), w, algorithm, accuracy).any()
    assert not run(torch.full((3, 130), 1e-45), w, algorithm, accuracy).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("accuracy", ROUNDED)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_not_finite_stays_in_its_token_and_shows(algorithm: str, accuracy: str, value: float):
    w, x = weight(), activations(5)
    clean = run(x, w, algorithm, accuracy)
    x[2, 77] = value
    y = run(x, w, algorithm, accuracy)
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("accuracy", ROUNDED)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_size_of_x_does_not_matter(algorithm: str, accuracy: str, scale: float):
    w, x = weight(), activations(4)
    scaled = run(x * scale, w, algorithm, accuracy).double() / scale
    plain = run(x, w, algorithm, accuracy).double()
    limit = {"fast": 2e-2, "accurate": 1e-3, "near-exact": 1e-4}[accuracy]
    assert (scaled - plain).norm() <= limit * plain.norm()


def test_accuracies_are_ordered():
    w, x = weight(k=1000, n=200), activations(8, 1000)
    truth = x.double() @ w.dequantize().double().T
    errors = [(run(x, w, "lut_gemm", accuracy).double() - truth).norm() for accuracy in ROUNDED]
    assert errors[0] > 10 * errors[1] > 20 * errors[2] > 0
