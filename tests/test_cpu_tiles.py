"""`dequantize` by tiles of integers (`csrc/cpu/tile_gemm.h`): the error of every element, and what else it promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lutgemm.accuracy import ACCURACIES, DEFAULT
from lutgemm.backends import cpu, heuristics
from lutgemm.formats import BCQWeight
from lutgemm.ops import linear
from lutgemm.testing.cases import OpCase

pytestmark = pytest.mark.skipif("avx512vbmi" not in cpu.available_isas(), reason="this CPU has no AVX-512 VBMI")

SCALE_KINDS = ("free", "uniform", "ratio")
SPAN = 128


def weight(bits: int = 4, k: int = 300, group_size: int = 64, n: int = 130, **kind: object) -> BCQWeight:
    made = OpCase(N=n, K=k, bits=bits, group_size=group_size, **kind).weight()
    assert isinstance(made, BCQWeight)
    return made


def packed(w: BCQWeight, folded: bool = True) -> Tensor:
    tensors = [w.tensors.get(name) for name in ("codes", "scales", "offsets", "zeros", "ratios")]
    record = cpu._bcq_tensors(*tensors, w.shape[1], w.group_size, w.scale_kind)
    return torch.ops.lutgemm._bcq_pack_cpu(*record, True, folded)


def run(x: Tensor, w: BCQWeight, bias: Tensor | None = None) -> Tensor:
    return torch.ops.lutgemm._bcq_tile_gemm_cpu(x, packed(w), bias, w.shape[0])


def activations(tokens: int, k: int = 300) -> Tensor:
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens))


def bound(x: Tensor, w: BCQWeight) -> Tensor:
    """|error| of y `[M, N]`, fp64, as the header derives it; the rounding of fp32 comes on top."""
    uniform, group, k = w.scale_kind == "uniform", min(w.group_size, w.shape[1]), w.shape[1]
    dense = w.dequantize().double().abs()
    total = 2.0**-18 * x.double().abs() @ dense.T
    pairs = (w.bits + 1) // 2
    most = w.plane_scales().double().abs().sum(0)
    offsets = w.plane_offsets()
    if offsets is not None:
        most = most + offsets.double().abs()
    for start in range(0, k, group):
        for first in range(start, min(start + group, k), SPAN):
            span = slice(first, min(first + SPAN, start + group, k))
            part = x[:, span].double().abs()
            step = part.amax(1) / 32767
            if not uniform:
                step = torch.maximum(step, part.sum(1) / 262000)
                unit = most[:, start // group] / (8190.5 - pairs / 2)
                total += (part.sum(1) + SPAN / 2 * step)[:, None] * (unit * pairs / 2)
            total += step[:, None] / 2 * dense[:, span].sum(1)
    return total * (1 + 1e-5)


@pytest.mark.parametrize("scale_kind", SCALE_KINDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_element_is_within_its_derived_bound(bits: int, scale_kind: str):
    for k, group_size, offsets in ((300, 64, True), (1000, 1000, False), (33, 32, True), (520, 256, True)):
        w = weight(bits, k, group_size, scale_kind=scale_kind, offsets=offsets, n=70)
        x = activations(9, k)
        x[3:, ::61] *= 50
        x[6] = 1.0
        error = (run(x, w).double() - x.double() @ w.dequantize().double().T).abs()
        assert (error <= bound(x, w)).all()


def test_integers_that_fit_are_exact():
    """Steps and units of 1: nothing is rounded."""
    w = OpCase(N=70, K=300, bits=4, group_size=64, scale_kind="uniform").weight("exact")
    x = torch.randint(-4, 5, (20, 300), generator=torch.Generator().manual_seed(0)).float()
    x[:, ::32] = 32767.0
    assert torch.equal(run(x, w), (x.double() @ w.dequantize().double().T).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_of_16_bits_are_rounded_once(dtype: torch.dtype):
    w, x = weight(), activations(18).to(dtype)
    bias = torch.randn(130).to(dtype)
    assert torch.equal(run(x, w, bias), (run(x.float(), w) + bias.float()).to(dtype))


@pytest.mark.parametrize("scale_kind", SCALE_KINDS[:2])
def test_a_token_does_not_depend_on_its_neighbours_nor_on_the_pass(scale_kind: str):
    w, x = weight(k=130, n=65, scale_kind=scale_kind), activations(300, 130)
    together = run(x, w)
    assert torch.equal(together, torch.cat([run(rows, w) for rows in x.split(7)]))


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


@pytest.mark.parametrize("scale_kind", SCALE_KINDS[:2])
def test_extremes_of_x(scale_kind: str):
    w, x = weight(scale_kind=scale_kind, offsets=False), activations(5)
    clean = run(x, w)
    assert not run(torch.zeros(3, 300), w).any()
    assert not run(torch.full((3, 300), 1e-45), w).any()
    for scale in (1e-30, 1e30):
        assert (run(x * scale, w).double() / scale - clean.double()).norm() <= 1e-3 * clean.double().norm()
    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt = x.clone()
        spoilt[2, 77] = value
        y = run(spoilt, w)
        assert not y[2].isfinite().any()
        assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_rows_without_weight():
    w = weight(bits=3)
    w.scales[:, 5] = 0
    w.offsets[5] = 0
    assert not run(activations(3), w)[:, 5].any()


def test_dequantize_multiplies_tiles_where_the_thresholds_say_so(monkeypatch: pytest.MonkeyPatch):
    w, x = weight(), activations(20)
    tiles = run(x, w)
    panels = linear(x, w, backend="cpu", algorithm="dequantize", accuracy="exact")
    assert not torch.equal(tiles, panels)
    for last, expected in ((20, tiles), (19, panels)):
        monkeypatch.setattr(cpu, "tiled_tokens", lambda *_, last=last: (0, last))
        assert torch.equal(linear(x, w, backend="cpu", algorithm="dequantize", accuracy="accurate"), expected)
        with cpu.always_tiles():
            assert torch.equal(linear(x, w, backend="cpu", algorithm="dequantize", accuracy="fast"), tiles)
            assert torch.equal(linear(x, w, backend="cpu", algorithm="dequantize", accuracy="near-exact"), panels)
            with cpu.use_isa("avx512"):
                assert not cpu.has_tiles("bcq_linear", ACCURACIES.index(DEFAULT))


def test_rows_of_tiles_are_taken_by_cost():
    rows = tuple(row for row in heuristics.CPU_THRESHOLDS if row.algorithm == "dequantize")
    assert [row.max_cost for row in rows] == sorted(row.max_cost for row in rows)
    assert heuristics.tiled_tokens("bcq_linear", 9, torch.float32, rows) == (heuristics.NO_CROSSING, 0)
    assert heuristics.tiled_tokens("codebook_linear", 2, torch.float32, rows) == (heuristics.NO_CROSSING, 0)
    starts = [heuristics.tiled_tokens("bcq_linear", bits, torch.float32, rows)[0] for bits in range(1, 9)]
    assert starts == sorted(starts, reverse=True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"packed": torch.zeros(100, dtype=torch.uint8)}, "does not start with the mark"),
        ({"packed": torch.zeros(100)}, "must be uint8"),
        ({"N": 131}, "it holds N=130, N=131 was asked for"),
        ({"x": torch.zeros(2, 299)}, "its last dimension must be K=300"),
        ({"bias": torch.zeros(129)}, "bias: got shape"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, text: str):
    arguments = {"x": torch.zeros(2, 300), "packed": packed(weight()), "bias": None, "N": 130}
    assert torch.ops.lutgemm._bcq_tile_gemm_cpu(**arguments).shape == (2, 130)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.lutgemm._bcq_tile_gemm_cpu(**(arguments | change))


def test_plain_codes_are_refused():
    with pytest.raises(RuntimeError, match="its codes are plain"):
        torch.ops.lutgemm._bcq_tile_gemm_cpu(torch.zeros(2, 300), packed(weight(), folded=False), None, 130)
