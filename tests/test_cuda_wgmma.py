"""Both forms of `dequant_gemm` of csrc/cuda: by mma.sync, and by wgmma with bulk copies (sm_90a).

`test_cuda_emulated.py` runs whichever is chosen on the cases of all kernels; here are both on shapes that cut the
tiles of each, the weights that registers hold, and how a problem is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import emulated_backend
import pytest
import torch
from conftest import REQUIRED
from emulated_backend import Emulated
from torch import Tensor

from lutgemm.backends import cuda
from lutgemm.backends.gpu_layouts import BcqRecord
from lutgemm.backends.gpu_layouts.bit_planes import _described, layout
from lutgemm.formats import BCQWeight
from lutgemm.testing.cases import Inputs, OpCase
from lutgemm.testing.numerics import assert_equal, assert_within, exact_result, rms, rounded_allowance

BEST, MMA_SYNC, WGMMA = 0, 1, 2
FORMS = (MMA_SYNC, WGMMA)


@pytest.fixture(scope="module")
def built() -> Emulated:
    if emulated_backend.compiler() is None:
        if "emulator" in REQUIRED:
            pytest.fail("--require emulator: no g++ is on PATH")
        pytest.skip("no g++ is on PATH")
    return emulated_backend.emulated()


@pytest.fixture
def emulated(built: Emulated) -> Iterator[Emulated]:
    """Tests that change the emulated device leave it as it was."""
    yield built
    built.control.set(seed=0, counts=0, sm_count=4, architecture=90)


def arguments(weight: BCQWeight) -> tuple[tuple[Tensor, Tensor], tuple[int | bool, ...]]:
    """The layout's tensors, and what the operator is told of them."""
    t = weight.tensors
    tensors = (t["codes"], t["scales"], t.get("offsets"), t.get("zeros"), t.get("ratios"))
    record = BcqRecord(*tensors, weight.shape[1], weight.group_size, weight.layout.scale_kind)
    return layout(record), _described(record)


def run(x: Tensor, weight: BCQWeight, form: int, bias: Tensor | None = None) -> Tensor:
    """By the emulator, or by the GPU where x is there."""
    tensors, numbers = arguments(weight)
    ops = torch.ops.lutgemm if x.is_cuda else torch.ops.lutgemm_emulated
    return ops._bcq_dequant_gemm_cuda(x, *tensors, bias, *numbers, form)


def check(inputs: Inputs, y: Tensor, what: str) -> None:
    truth = exact_result(inputs.x, inputs.weight, inputs.bias)
    assert_within(y, truth, float("inf"), what)
    own, allowed = rms(y.double() - truth), rounded_allowance(*vars(inputs).values(), "accurate")
    assert own <= allowed, f"{what}: rms error {own:.3e}, allowed {allowed:.3e}"


KINDS = (
    ("free", True, 32, "float16"),
    ("free", False, 64, "float32"),
    ("ratio", True, 0, "bfloat16"),
    ("uniform", True, 32, "float32"),
    ("uniform", True, 0, "float16"),
)
"""kind, offsets, group size, dtype of scales"""
SHAPES = (
    OpCase(M=17, N=130, K=600, bits=3, bias=True, dtype="bfloat16"),
    OpCase(M=33, N=257, K=130, bits=4, scale_kind="uniform", dtype="float16"),
    OpCase(M=65, N=15, K=1000, bits=2, group_size=128, bias=True, scale_dtype="bfloat16"),
    OpCase(M=255, N=100, K=260, bits=1, group_size=64, dtype="float16", outliers=True),
    OpCase(M=257, N=20, K=127, bits=5, scale_kind="uniform", dtype="bfloat16"),
    OpCase(M=300, N=300, K=40, bits=2, bias=True, dtype="float16"),
    OpCase(M=1, N=16, K=128, bits=2),
    OpCase(M=20, N=24, K=2600, bits=8, scale_kind="ratio", group_size=96, dtype="float16"),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_shapes_that_cut_the_tiles(case: OpCase, form: int, emulated: Emulated) -> None:
    """With K split over blocks and not; a ring of copies is then used again and again."""
    inputs = case.inputs()
    for sm_count in (1, 7):
        emulated.control.set(sm_count=sm_count)
        check(inputs, run(inputs.x, inputs.weight, form, inputs.bias), f"{case.name}, {sm_count} multiprocessors")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_registers_hold_the_weights(bits: int, form: int, emulated: Emulated) -> None:
    """Rows of the identity matrix return columns of W: exactly for scales that are powers of two."""
    columns = torch.randperm(160, generator=torch.Generator().manual_seed(bits))[:32]
    x = torch.eye(160)[columns]
    for kind, offsets, group_size, scale_dtype in KINDS:
        case = OpCase(N=20, K=160, bits=bits, scale_kind=kind, offsets=offsets, group_size=group_size)
        weight = case.weight("exact")
        assert_equal(run(x, weight, form), weight.dequantize()[:, columns].T, case.name)
        weight = replace(case, scale_dtype=scale_dtype).weight()
        w = weight.dequantize()
        error = (run(x, weight, form).T - w[:, columns]).abs()
        # Each plane's scale and partial sum is rounded to fp16, and none exceeds twice the row's largest weight.
        bound = (bits + 2) * 2.0**-11 * w.abs().amax(1, keepdim=True)
        assert (error <= bound).all(), f"{case.name} {scale_dtype}: {(error / bound).max():.2f} of the bound"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["free", "uniform"])
def test_magnitudes_that_fp16_does_not_have(kind: str, form: int, emulated: Emulated) -> None:
    """Tokens and rows from 2^-60 to 2^60, and rows and tokens of zeros, beside each other."""
    case = OpCase(M=19, N=24, K=200, bits=3, scale_kind=kind, scale_dtype="float32", dtype="float32")
    inputs = case.inputs()
    tokens = 2.0 ** torch.linspace(-60, 60, case.M).round()
    rows = 2.0 ** torch.linspace(-60, 60, case.N).round()
    tokens[3], rows[5] = 0, 0
    plain = run(inputs.x, inputs.weight, form)
    inputs.weight.scales.mul_(rows[:, None])
    if inputs.weight.offsets is not None:
        inputs.weight.offsets.mul_(rows[:, None])
    assert_equal(run(inputs.x * tokens[:, None], inputs.weight, form), plain * tokens[:, None] * rows)


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_inf_stay_in_their_token(form: int, emulated: Emulated) -> None:
    inputs = OpCase(M=33, N=70, K=200, bits=3).inputs()
    x = inputs.x.clone()
    x[1, 5], x[2, 6], x[2, 7] = float("nan"), float("inf"), float("-inf")
    clean, y = run(inputs.x, inputs.weight, form), run(x, inputs.weight, form)
    assert not y[1:3].isfinite().any()
    assert_equal(y[3:], clean[3:], "other tokens")


@pytest.mark.parametrize("form", FORMS)
def test_activations_of_one_sign(form: int, emulated: Emulated) -> None:
    """They add up what rounding takes from the few values of W, and so does a token of equal values most of all."""
    for bits, kind, group_size in ((3, "free", 0), (2, "free", 128), (4, "uniform", 128), (3, "ratio", 0)):
        offsets = kind != "free"
        case = OpCase(M=17, N=40, K=2030, bits=bits, scale_kind=kind, group_size=group_size, offsets=offsets)
        x, weight, _ = vars(case.inputs()).values()
        x = x.abs()
        x[3], x[4] = 1, -3e-3
        for sm_count in (1, 7):
            emulated.control.set(sm_count=sm_count)
            check(Inputs(x, weight, None), run(x, weight, form), f"{case.name}, {sm_count} multiprocessors")


def test_a_row_keeps_its_small_groups(emulated: Emulated) -> None:
    """A group of columns with 2^-8 of the scales of another one is as accurate, in units of its own scale."""
    case = OpCase(M=17, N=16, K=256, bits=4, group_size=128)
    weight = case.weight()
    for t in (weight.scales, weight.offsets):
        t[..., 1].mul_(2.0**-8)
    x = case.inputs().x.clone()
    x[:, :128] = 0
    for form in FORMS:
        check(Inputs(x, weight, None), run(x, weight, form), f"form {form}")


def test_both_forms_multiply_the_same_numbers(emulated: Emulated) -> None:
    """They differ by the order of fp32 sums alone; the form of the device is one of them."""
    for case in (OpCase(M=40, N=70, K=600, bits=3), OpCase(M=40, N=70, K=600, bits=4, scale_kind="uniform")):
        inputs = case.inputs()
        mma, wgmma = (run(inputs.x, inputs.weight, form) for form in FORMS)
        assert rms(mma.double() - wgmma) < 1e-6 * rms(mma)
        assert_equal(run(inputs.x, inputs.weight, BEST), wgmma, "sm_90")
        emulated.control.set(architecture=80)
        assert_equal(run(inputs.x, inputs.weight, BEST), run(inputs.x, inputs.weight, MMA_SYNC), "sm_80")
        emulated.control.set(architecture=90)
        few = inputs.x[:16]
        assert_equal(run(few, inputs.weight, BEST), run(few, inputs.weight, MMA_SYNC), "few tokens")


def test_bits_do_not_depend_on_the_order_of_blocks(emulated: Emulated) -> None:
    inputs = OpCase(M=130, N=300, K=700, bits=2, dtype="float16", bias=True).inputs()
    emulated.control.set(sm_count=16)
    first = run(inputs.x, inputs.weight, WGMMA, inputs.bias)
    for seed in (1, 2):
        emulated.control.set(seed=seed)
        assert_equal(run(inputs.x, inputs.weight, WGMMA, inputs.bias), first, f"seed {seed}")


@pytest.mark.parametrize("M", [33, 128])
@pytest.mark.parametrize("form", FORMS)
def test_accesses_are_without_conflicts_and_whole_sectors(M: int, form: int, emulated: Emulated) -> None:
    inputs = OpCase(M=M, N=256, K=512, bits=3, group_size=128, dtype="float16").inputs()
    emulated.control.set(counts=1)
    emulated.control.reset_counts()
    run(inputs.x, inputs.weight, form)
    sites = emulated.control.report()
    for space, budget in (("shared", 1.02), ("global", 1.1)):
        own = [site for site in sites if site["space"] == space]
        cost, ideal = (sum(site[key] for site in own) for key in ("cost", "ideal"))
        worst = sorted(own, key=lambda site: site["ideal"] - site["cost"])[:4]
        assert cost <= budget * ideal, f"{space} memory, {cost} instead of {ideal}; the worst: {worst}"


def plan(m: int, n: int, k: int, bits: int, sm_count: int, capability: int = 90, wide: bool = False) -> list[int]:
    x = torch.empty(m, k)
    steps = 4 if wide else 1
    return torch.ops.lutgemm_emulated._dequant_gemm_plan(x, n, bits, wide, steps, sm_count, capability).tolist()


def test_a_cut_covers_the_problem(emulated: Emulated) -> None:
    sizes = product((1, 17, 40, 65, 300), (1, 100, 4096, 28672), (1, 1000, 4096, 14336), (1, 8), (1, 108, 132))
    for (m, n, k, bits, sm_count), capability in product(sizes, (80, 90)):
        wgmma, tokens, stages, row_blocks, splits, token_blocks, split_chunks, shared = plan(
            m, n, k, bits, sm_count, capability, wide=bits == 8
        )
        chunks, rows = -(-k // 128), 256 if wgmma else 128
        assert bool(wgmma) == (capability == 90 and m > 16)
        assert (row_blocks - 1) * rows < n <= row_blocks * rows
        assert (splits - 1) * split_chunks < chunks <= splits * split_chunks
        assert (token_blocks - 1) * tokens < m <= token_blocks * tokens
        assert stages >= 2
        assert shared <= 227 << 10
        assert splits == 1 or row_blocks * token_blocks * splits <= sm_count, "one wave"


def test_layers_of_models_fill_a_gpu(emulated: Emulated) -> None:
    shapes = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (8192, 28672))
    for (n, k), m, bits in product(shapes, (32, 64, 128, 256), (2, 4)):
        _, tokens, stages, row_blocks, splits, token_blocks, split_chunks, _ = plan(m, n, k, bits, 132)
        blocks = row_blocks * splits * token_blocks
        work = -(-blocks // 132) * split_chunks * 132 / (row_blocks * token_blocks * -(-k // 128))
        assert work < 1.4, (n, k, m, work)
        assert stages >= 4, "three chunks under way while one is multiplied"
        assert token_blocks * tokens == m


def test_the_operator_refuses_forms_that_there_are_not(emulated: Emulated) -> None:
    inputs = OpCase(M=2, N=16, K=128).inputs()
    with pytest.raises(RuntimeError, match="form=3: must be from 0 to 2"):
        run(inputs.x, inputs.weight, 3)
    emulated.control.set(architecture=80)
    with pytest.raises(RuntimeError, match="has no wgmma"):
        run(inputs.x, inputs.weight, WGMMA)


LARGE = [
    OpCase(M=m, N=n, K=k, bits=bits, scale_kind=kind, group_size=128, dtype=dtype, bias=True)
    for m, n, k, bits, kind, dtype in (
        (17, 4096, 4096, 3, "free", "float16"),
        (64, 1000, 8192, 4, "free", "bfloat16"),
        (128, 8192, 4096, 4, "uniform", "float16"),
        (300, 2048, 11008, 2, "free", "float32"),
        (64, 4096, 2048, 8, "ratio", "bfloat16"),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [*SHAPES, *LARGE], ids=lambda case: case.name)
def test_on_a_gpu(case: OpCase, form: int) -> None:
    """The same bounds, and the same bits in every run: a missing wait would show as a rare difference."""
    if reason := cuda.BACKEND.unavailable():
        if "cuda" in REQUIRED:
            pytest.fail(f"--require cuda: {reason}")
        pytest.skip(f"backend cuda: {reason}")
    if form == WGMMA and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is of compute capability 9.0")
    inputs = case.inputs()
    x, bias = inputs.x.cuda(), None if inputs.bias is None else inputs.bias.cuda()
    weight = inputs.weight.to("cuda")
    first = run(x, weight, form, bias)
    check(inputs, first.cpu(), case.name)
    for _ in range(50):
        assert_equal(run(x, weight, form, bias), first, case.name)
