"""`dequantize` by tiles of integers (`csrc/cpu/tile_gemm.h`): the error of every element, and what else it promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lutgemm.accuracy import ACCURACIES, DEFAULT
from lutgemm.backends import Problem, cpu, heuristics
from lutgemm.formats import BCQWeight
from lutgemm.ops import linear
from lutgemm.testing.cases import OpCase

pytestmark = pytest.mark.skipif("avx512vbmi" not in cpu.available_isas(), reason="this CPU has no AVX-512 VBMI")

SCALE_KINDS = ("free", "uniform", "ratio")
SPAN = 128
TILED = ("fast", "accurate")


def weight(bits: int = 4, k: int = 300, group_size: int = 64, n: int = 130, **kind: object) -> BCQWeight:
    made = OpCase(N=n, K=k, bits=bits, group_size=group_size, **kind).weight()
    assert isinstance(made, BCQWeight)
    return made


def packed(w: BCQWeight, folded: bool = True) -> Tensor:
    tensors = [w.tensors.get(name) for name in ("codes", "scales", "offsets", "zeros", "ratios")]
    record = cpu._bcq_tensors(*tensors, w.shape[1], w.group_size, w.scale_kind)
    return torch.ops.lutgemm._bcq_pack_cpu(*record, True, folded)


def run(x: Tensor, w: BCQWeight, bias: Tensor | None = None, accuracy: str = "accurate") -> Tensor:
    return torch.ops.lutgemm._bcq_tile_gemm_cpu(x, packed(w), bias, w.shape[0], ACCURACIES.index(accuracy))


def activations(tokens: int, k: int = 300) -> Tensor:
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens))


def bound(x: Tensor, w: BCQWeight, accuracy: str) -> Tensor:
    """|error| of y `[M, N]`, fp64, as the header derives it; the rounding of fp32 comes on top."""
    uniform, group, k, fast = w.scale_kind == "uniform", min(w.group_size, w.shape[1]), w.shape[1], accuracy == "fast"
    dense = w.dequantize().double().abs()
    integers = w.plane_scales().double().abs().sum(0).amax(1)
    total = 2.0**-18 * x.double().abs() @ dense.T + 2.0**-20 * x.double().abs().sum(1)[:, None] * integers
    pairs = (w.bits + 1) // 2
    most = w.plane_scales().double().abs().sum(0)
    offsets = w.plane_offsets()
    if offsets is not None:
        most = most + offsets.double().abs()
    for start in range(0, k, group):
        unit = most[:, start // group] / ((126.5 if fast else 8190.5) - pairs / 2)
        for first in range(start, min(start + group, k), SPAN):
            for inner in range(first, min(first + SPAN, start + group, k), 32 if fast else SPAN):
                span = slice(inner, min(inner + (32 if fast else SPAN), start + group, k))
                part = x[:, span].double().abs()
                step = part.amax(1) / (127 if fast else 32767)
                if not uniform and not fast:
                    step = torch.maximum(step, part.sum(1) / 262000)
                if not uniform:
                    total += (part.sum(1) + part.shape[1] / 2 * step)[:, None] * (unit * pairs / 2)
                total += step[:, None] / 2 * dense[:, span].sum(1)
    return total * (1 + 1e-5)


@pytest.mark.parametrize("accuracy", TILED)
@pytest.mark.parametrize("scale_kind", SCALE_KINDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_element_is_within_its_derived_bound(bits: int, scale_kind: str, accuracy: str):
    for k, group_size, offsets in ((300, 64, True), (1000, 1000, False), (33, 32, True), (520, 256, True)):
        w = weight(bits, k, group_size, scale_kind=scale_kind, offsets=offsets, n=70)
        x = activations(9, k)
        x[3:, ::61] *= 50
        x[6] = 1.0
        error = (run(x, w, accuracy=accuracy).double() - x.double() @ w.dequantize().double().T).abs()
        assert (error <= bound(x, w, accuracy)).all()


@pytest.mark.parametrize(
    ("accuracy", "largest", "bits"), [("fast", 127.0, 3), ("fast", 127.0, 8), ("accurate", 32767.0, 3)]
)
def test_integers_that_fit_are_exact(accuracy: str, largest: float, bits: int):
    """Steps and units of 1: nothing is rounded."""
    w = OpCase(N=70, K=300, bits=bits, group_size=64, scale_kind="uniform").weight("exact")
    x = torch.randint(-4, 5, (20, 300), generator=torch.Generator().manual_seed(0)).float()
    x[:, ::32] = largest
    truth = (x.double() @ w.dequantize().double().T).float()
    assert torch.equal(run(x, w, accuracy=accuracy), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_of_16_bits_are_rounded_once(dtype: torch.dtype):
    w, x = weight(), activations(18).to(dtype)
    bias = torch.randn(130).to(dtype)
    assert torch.equal(run(x, w, bias), (run(x.float(), w) + bias.float()).to(dtype))


@pytest.mark.parametrize("accuracy", TILED)
@pytest.mark.parametrize("scale_kind", SCALE_KINDS[:2])
def test_a_token_does_not_depend_on_its_neighbours_nor_on_the_pass(scale_kind: str, accuracy: str):
    w, x = weight(k=130, n=65, scale_kind=scale_kind), activations(300, 130)
    together = run(x, w, accuracy=accuracy)
    assert torch.equal(together, torch.cat([run(rows, w, accuracy=accuracy) for rows in x.split(7)]))


@pytest.mark.parametrize("tokens", [5, 33])
def test_threads_do_not_change_a_bit(tokens: int):
    w, x = weight(n=4133, k=260), activations(tokens, 260)
    one = run(x, w)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(run(x, w), one) for _ in range(5))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("accuracy", TILED)
@pytest.mark.parametrize("scale_kind", SCALE_KINDS[:2])
def test_extremes_of_x(scale_kind: str, accuracy: str):
    w, x = weight(scale_kind=scale_kind, offsets=False), activations(5)
    clean = run(x, w, accuracy=accuracy)
    assert not run(torch.zeros(3, 300), w, accuracy=accuracy).any()
    assert not run(torch.full((3, 300), 1e-45), w, accuracy=accuracy).any()
    for scale in (1e-30, 1e30):
        scaled = run(x * scale, w, accuracy=accuracy).double() / scale
        assert (scaled - clean.double()).norm() <= 1e-3 * clean.double().norm()
    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt = x.clone()
        spoilt[2, 77] = value
        y = run(spoilt, w, accuracy=accuracy)
        assert not y[2].isfinite().any()
        assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_rows_without_weight():
    w = weight(bits=3)
    w.scales[:, 5] = 0
    w.offsets[5] = 0
    assert not run(activations(3), w)[:, 5].any()


def test_dequantize_multiplies_tiles_where_the_thresholds_say_so(monkeypatch: pytest.MonkeyPatch):
    w, x = weight(), activations(20)
    tiles, coarse = run(x, w), run(x, w, accuracy="fast")
    panels = linear(x, w, backend="cpu", algorithm="dequantize", accuracy="exact")
    assert not torch.equal(tiles, panels)
    for last, expected in ((20, tiles), (19, panels)):
        monkeypatch.setattr(cpu, "tiled_tokens", lambda *_, last=last: (0, last))
        assert torch.equal(linear(x, w, backend="cpu", algorithm="dequantize", accuracy="accurate"), expected)
        with cpu.always_tiles():
            assert torch.equal(linear(x, w, backend="cpu", algorithm="dequantize", accuracy="fast"), coarse)
            assert torch.equal(linear(x, w, backend="cpu", algorithm="dequantize", accuracy="near-exact"), panels)
            with cpu.use_isa("avx512"):
                assert not cpu.has_tiles("bcq_linear", ACCURACIES.index(DEFAULT))


@pytest.mark.parametrize("accuracy", TILED)
def test_rows_of_tiles_are_taken_by_cost(accuracy: str):
    rows = heuristics.CPU_THRESHOLDS
    costs = [row.max_cost for row in rows if (row.algorithm, row.accuracy) == ("dequantize", accuracy)]
    assert costs == sorted(costs)
    problem = Problem("bcq_linear", "cpu", torch.float32, 1, 4096, 4096, 128, 4, "free")
    problem = problem._replace(accuracy=ACCURACIES.index(accuracy))
    never = (heuristics.NO_CROSSING, 0)
    assert heuristics.tiled_tokens(problem._replace(planes=9), rows) == never
    assert heuristics.tiled_tokens(problem._replace(op="codebook_linear", vec_len=4, codebook_bits=8), rows) == never
    starts = [heuristics.tiled_tokens(problem._replace(planes=bits), rows)[0] for bits in range(1, 9)]
    assert starts == sorted(starts, reverse=True)
    for bits in (4, 6, 8):
        problem, first = problem._replace(planes=bits), starts[bits - 1]
        for m, expected in ((first - 1, "biqgemm"), (first, "dequantize")):
            assert heuristics.choose_on_cpu(problem._replace(M=m), True, tiles=True) == expected
        assert heuristics.choose_on_cpu(problem._replace(M=first), True, tiles=False) == "biqgemm"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"packed": torch.zeros(100, dtype=torch.uint8)}, "does not start with the mark"),
        ({"packed": torch.zeros(100)}, "must be uint8"),
        ({"N": 131}, "it holds N=130, N=131 was asked for"),
        ({"x": torch.zeros(2, 299)}, "its last dimension must be K=300"),
        ({"bias": torch.zeros(129)}, "bias: got shape"),
        ({"accuracy": 2}, "accuracy=2: must be 0"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, text: str):
    arguments = {"x": torch.zeros(2, 300), "packed": packed(weight()), "bias": None, "N": 130, "accuracy": 1}
    assert torch.ops.lutgemm._bcq_tile_gemm_cpu(**arguments).shape == (2, 130)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.lutgemm._bcq_tile_gemm_cpu(**(arguments | change))


def test_plain_codes_are_refused():
    with pytest.raises(RuntimeError, match="its codes are plain"):
        torch.ops.lutgemm._bcq_tile_gemm_cpu(torch.zeros(2, 300), packed(weight(), folded=False), None, 130, 1)
