"""Data-free BCQ quantizers: exact baselines, the guarantee against round-to-nearest, options, refusals, determinism."""

import math

import pytest
import torch

from lutgemm import ArgumentError, BCQConfig, BCQWeight, CodebookConfig
from lutgemm.formats.bcq import unpack_bits
from lutgemm.quantize import quantize, quantize_bcq, slabs, weight_error

GROUP = 64


def normal(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def heavy(n, k):
    return normal(n, k) * (1 + 30 * (normal(n, k, 1).abs() > 2.5))


WEIGHTS = {
    "normal": lambda: normal(24, 256),
    "outliers": lambda: heavy(24, 256),
    "constant": lambda: torch.arange(-5.0, 7.0).repeat_interleave(2)[:, None].expand(24, 256) * 0.37,
    "zero": lambda: torch.zeros(3, 256),
    "tiny": lambda: normal(8, 256) * 1e-6,
    "huge": lambda: normal(8, 256).clamp(-3, 3) * 1e4,
    "single_column": lambda: normal(16, 1),
    "tails": lambda: normal(9, 3 * GROUP + 17),
    "positive": lambda: normal(9, 192).abs() + 3,
    "negative": lambda: -normal(9, 192).abs() - 3,
    "two_values": lambda: (normal(9, 192) > 0).float() - 0.3,
    "bfloat16": lambda: normal(9, 192).bfloat16(),
    "mixed_sizes": lambda: normal(16, 256) * torch.logspace(-5, 3, 4).repeat_interleave(64),
}


def group_errors(weight, q, hessian=None):
    """fp64 `[N, G]`: the (weighted) squared error of every group."""
    difference = weight.double() - q.dequantize().double()
    square = difference.square() * (1 if hessian is None else hessian.double())
    return (
        torch.nn.functional.pad(square, (0, -weight.shape[1] % q.group_size)).unflatten(1, (-1, q.group_size)).sum(-1)
    )


@pytest.mark.parametrize("kind", ["free", "uniform"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", WEIGHTS)
def test_best_is_never_above_round_to_nearest_in_any_group(name, bits, kind):
    weight = WEIGHTS[name]()
    best = quantize_bcq(weight, bits, GROUP, scale_kind=kind)
    rtn = quantize_bcq(weight, bits, GROUP, scale_kind=kind, method="rtn")
    # 1e-12 of the energy: sums of exact fits cancel in fp64.
    slack = 1e-12 * weight.double().square().sum() / max(1, weight.shape[0])
    assert (group_errors(weight, best) <= group_errors(weight, rtn) + slack).all()
    best.check_values()


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["free", "uniform"])
def test_the_guarantee_holds_for_every_scale_dtype_and_without_offsets(kind, scale_dtype):
    weight = heavy(16, 200)
    for offsets in (True, False):
        options = {"scale_kind": kind, "scale_dtype": scale_dtype, "offsets": offsets}
        best = quantize_bcq(weight, 3, 32, **options)
        rtn = quantize_bcq(weight, 3, 32, method="rtn", **options)
        assert best.scales.dtype == getattr(torch, scale_dtype)
        assert (best.offsets is not None) == (offsets and kind == "free")
        assert (group_errors(weight, best) <= group_errors(weight, rtn)).all()


@pytest.mark.parametrize("hessian_shape", ["diagonal", "full"])
@pytest.mark.parametrize("kind", ["free", "uniform"])
def test_hessian_weights_the_error_and_the_guarantee(kind, hessian_shape):
    weight = normal(32, 160)
    diagonal = normal(1, 160, 3)[0].exp().square()
    diagonal[64:128] = 0
    hessian = diagonal if hessian_shape == "diagonal" else torch.diag(diagonal) + 0.1
    diagonal = hessian if hessian.ndim == 1 else hessian.diagonal()
    aware = quantize_bcq(weight, 3, 64, hessian, scale_kind=kind)
    blind = quantize_bcq(weight, 3, 64, scale_kind=kind)
    rtn = quantize_bcq(weight, 3, 64, hessian, scale_kind=kind, method="rtn")
    assert (group_errors(weight, aware, diagonal) <= group_errors(weight, rtn, diagonal)).all()
    assert group_errors(weight, aware, diagonal).sum() < 0.95 * group_errors(weight, blind, diagonal).sum()
    # The second group has equal importance throughout: as if there were none.
    assert torch.equal(aware.codes[:, :, 2:4], blind.codes[:, :, 2:4])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_rtn_is_the_ordinary_min_max_grid(bits):
    weight = torch.cat((heavy(16, 100), normal(4, 100).abs() + 1, -normal(4, 100).abs() - 1))
    q = quantize_bcq(weight, bits, 32, scale_kind="uniform", method="rtn")
    for n in range(len(weight)):
        for g in range(4):
            group = weight[n, 32 * g : 32 * g + 32]
            low, high = min(group.min().item(), 0.0), max(group.max().item(), 0.0)
            scale = torch.tensor((high - low) / (2**bits - 1), dtype=torch.float16).float()
            zero = torch.round(-torch.tensor(low) / scale).clamp(0, 2**bits - 1)
            integer = (torch.round(group / scale) + zero).clamp(0, 2**bits - 1)
            assert q.scales[0, n, g] == scale
            assert q.zeros[n, g] == zero
            assert torch.equal(q.dequantize()[n, 32 * g : 32 * g + 32], scale * (integer - zero))


def test_rtn_free_is_the_same_grid():
    weight = normal(16, 128)
    free = quantize_bcq(weight, 4, 64, scale_kind="free", method="rtn", scale_dtype="float32")
    uniform = quantize_bcq(weight, 4, 64, scale_kind="uniform", method="rtn", scale_dtype="float32")
    assert torch.equal(free.codes, uniform.codes)
    torch.testing.assert_close(free.dequantize(), uniform.dequantize(), rtol=0, atol=1e-6)


def test_greedy_is_the_formula_of_the_paper():
    weight = normal(8, 96)
    q = quantize_bcq(weight, 3, 32, method="greedy", offsets=False, scale_dtype="float32")
    residual = weight.unflatten(1, (3, 32)).clone()
    for plane in range(3):
        scale = residual.abs().mean(-1)
        torch.testing.assert_close(q.scales[plane], scale, rtol=1e-5, atol=0)
        sign = torch.where(residual >= 0, 1.0, -1.0)
        got = unpack_bits(q.codes[plane], 96).unflatten(1, (3, 32)).float() * 2 - 1
        assert torch.equal(got, sign)
        residual -= scale[..., None] * sign


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_methods_rank_as_published(bits, offsets):
    weight = heavy(64, 256)
    error = {
        method: weight_error(weight, quantize_bcq(weight, bits, 64, method=method, scale_kind="free", offsets=offsets))[
            0
        ]
        for method in ("greedy", "refined", "alternating", "best", "rtn", "rtn_clip")
    }
    assert error["refined"] < error["greedy"]
    assert error["alternating"] < error["greedy"]
    assert error["best"] <= min(error["alternating"] * 1.02, error["rtn_clip"], error["rtn"])
    assert error["rtn_clip"] < error["rtn"]


def test_refined_scales_are_a_least_squares_fit():
    weight = normal(4, 64)
    q = quantize_bcq(weight, 3, 64, method="refined", scale_dtype="float32")
    signs = torch.stack(
        [unpack_bits(q.codes[b], 64).double() * 2 - 1 for b in range(3)] + [torch.ones(4, 64).double()], -1
    )
    solution = torch.linalg.lstsq(signs, weight.double()[..., None]).solution[..., 0]
    got = torch.cat((q.scales[:, :, 0].T, q.offsets), 1).double()
    torch.testing.assert_close(got, solution, rtol=1e-5, atol=1e-6)


def test_free_beats_uniform_beats_rtn_by_a_margin():
    weight = normal(64, 512)
    error = {
        (kind, method): weight_error(weight, quantize_bcq(weight, 3, 64, scale_kind=kind, method=method))[0]
        for kind, method in (("uniform", "rtn"), ("uniform", "best"), ("free", "best"))
    }
    assert error["uniform", "best"] < 0.85 * error["uniform", "rtn"]
    assert error["free", "best"] < 0.75 * error["uniform", "rtn"]


def test_planes_are_ordered_and_scales_nonnegative():
    for method in ("best", "refined", "alternating"):
        scales = quantize_bcq(heavy(16, 200), 4, 32, scale_kind="free", method=method).scales.float()
        assert (scales >= 0).all()
        assert (scales.diff(dim=0) <= 0).all()


def test_values_on_a_grid_are_reproduced_exactly():
    integers = torch.randint(0, 16, (8, 128), generator=torch.Generator().manual_seed(0)).float()
    integers[:, ::64], integers[:, 1::64] = 0, 15
    weight = 0.125 * (integers - 8)
    for kind in ("uniform", "free", "auto"):
        assert torch.equal(quantize_bcq(weight, 4, 64, scale_kind=kind).dequantize(), weight)


def test_zero_groups_are_exact_zeros():
    weight = normal(4, 128)
    weight[:, 64:] = 0
    for kind in ("uniform", "free"):
        for method in ("best", "rtn", "rtn_clip"):
            assert not quantize_bcq(weight, 3, 64, scale_kind=kind, method=method).dequantize()[:, 64:].any()


def test_groups_on_one_side_of_zero_use_a_zero_beyond_the_codes():
    for sign in (1, -1):
        weight = sign * (normal(8, 64).clamp(-2, 2) + 10)
        best = quantize_bcq(weight, 4, 64, scale_kind="uniform")
        rtn = quantize_bcq(weight, 4, 64, scale_kind="uniform", method="rtn")
        assert weight_error(weight, best)[0] < 0.2 * weight_error(weight, rtn)[0]
        assert (best.zeros > 15).all()


@pytest.mark.parametrize("kind", ["free", "uniform"])
def test_subnormal_fp16_scales(kind):
    weight = normal(8, 128) * 3e-7
    q = quantize_bcq(weight, 3, 64, scale_kind=kind)
    error, energy = weight_error(weight, q)
    assert error < 0.2 * energy
    tiny = torch.full((1, 64), 1e-30)
    assert weight_error(tiny, quantize_bcq(tiny, 3, 64, scale_kind=kind))[0] <= 1e-12
    wide = normal(8, 128) * 1e-30
    error, energy = weight_error(wide * 1e30, quantize_bcq(wide * 1e30, 3, 64, scale_kind=kind, scale_dtype="float32"))
    scaled = quantize_bcq(wide, 3, 64, scale_kind=kind, scale_dtype="float32").dequantize() * 1e30
    assert (scaled - wide * 1e30).square().sum() < 1.05 * error


@pytest.mark.parametrize("kind", ["free", "uniform", "auto"])
def test_overflow_of_the_scale_dtype_names_the_remedy(kind):
    weight = normal(4, 64) * 1e6
    with pytest.raises(ArgumentError, match=r'scale_dtype="float16" overflows.*use scale_dtype="float32"'):
        quantize_bcq(weight, 3, 64, scale_kind=kind)
    q = quantize_bcq(weight, 3, 64, scale_kind=kind, scale_dtype="float32")
    assert weight_error(weight, q)[0] < 0.1 * weight_error(weight, q)[1]


def test_auto_takes_the_kind_of_less_distortion_at_equal_rate():
    assert quantize_bcq(normal(64, 512), 4, 64).scale_kind == "uniform"
    levels = torch.tensor([-4.0, -1.0, 1.0, 4.0])
    clustered = levels[torch.randint(0, 4, (64, 512), generator=torch.Generator().manual_seed(0))]
    q = quantize_bcq(clustered + 0.01 * normal(64, 512), 2, 64)
    assert q.scale_kind == "free"
    assert quantize_bcq(normal(8, 64), 4, 64, method="greedy").scale_kind == "free"
    assert quantize_bcq(normal(8, 64), 4, 64, method="rtn").scale_kind == "uniform"
    assert quantize_bcq(normal(8, 64), 4, 64, nested_bits=(2,)).scale_kind == "free"


@pytest.mark.parametrize("offsets", [True, False])
def test_nested_precisions_have_scales_of_their_own(offsets):
    weight = heavy(32, 200)
    q = quantize_bcq(weight, 5, 64, nested_bits=(4, 2, 1, 3, 2), offsets=offsets)
    plain = quantize_bcq(weight, 5, 64, scale_kind="free", offsets=offsets)
    assert q.layout.nested_bits == (1, 2, 3, 4)
    assert torch.equal(q.codes, plain.codes)
    errors = torch.stack([group_errors(weight, q.at(p)) for p in range(1, 6)])
    assert (errors[1:] <= errors[:-1] * 1.001).all()
    assert weight_error(weight, q.at(3))[0] < 0.9 * weight_error(weight, plain.at(3))[0]
    again = BCQWeight.from_state_dict(q.state_dict())
    assert torch.equal(again.at(2).dequantize(), q.at(2).dequantize())


@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(1, 1, 32), (5, 31, 32), (3, 33, 32), (7, 100, 64), (2, 70, "row"), (4, 96, 4096)]
)
def test_any_shape(n, k, group_size):
    weight = normal(n, k)
    for kind in ("free", "uniform"):
        q = quantize_bcq(weight, 4, group_size, scale_kind=kind)
        assert q.shape == (n, k)
        assert q.scales.shape[-1] == math.ceil(k / q.group_size)
        error, energy = weight_error(weight, q)
        assert error < 0.03 * energy
        q.check_values()


@pytest.mark.parametrize("method", ["best", "alternating", "refined"])
@pytest.mark.parametrize("kind", ["free", "uniform"])
def test_same_bytes_every_run_for_any_slab_and_thread_count(kind, method, monkeypatch):
    if kind == "uniform" and method != "best":
        pytest.skip("the integer grid has no such method")
    weight = heavy(16, 208)
    weight[3:9] = weight[3:9].abs() + 1
    hessian = normal(1, 208, 5)[0].square()

    def state():
        return quantize_bcq(weight, 3, 64, hessian, scale_kind=kind, method=method).state_dict()

    first = state()
    for run in range(20):
        torch.set_num_threads(1 + (run == 8))
        monkeypatch.setattr(slabs, "SLAB_ELEMENTS", (1 << 18, 208 * 5, 208 * 11, 1)[run % 4])
        assert all(torch.equal(first[name], tensor) for name, tensor in state().items())


def test_rows_do_not_influence_each_other():
    weight = heavy(20, 128)
    whole = quantize_bcq(weight, 3, 64, scale_kind="free")
    part = quantize_bcq(weight[5:9], 3, 64, scale_kind="free")
    assert torch.equal(whole.codes[:, 5:9], part.codes)
    assert torch.equal(whole.scales[:, 5:9], part.scales)


def test_any_strides_and_dtypes_of_the_weight():
    weight = normal(128, 24).bfloat16()
    whole = quantize_bcq(weight.T, 3, 64)
    assert torch.equal(whole.dequantize(), quantize_bcq(weight.T.contiguous().double(), 3, 64).dequantize())
    assert not whole.scales.requires_grad
    assert torch.equal(quantize_bcq(torch.nn.Parameter(weight.T), 3, 64).codes, whole.codes)


def test_iters_zero_is_the_start_and_more_is_no_worse():
    weight = heavy(32, 256)
    for kind in ("free", "uniform"):
        errors = [weight_error(weight, quantize_bcq(weight, 3, 64, scale_kind=kind, iters=i))[0] for i in (0, 1, 4, 15)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0]


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (torch.full((2, 64), math.nan), "weight holds NaN or Inf"),
        (torch.tensor([[1.0, math.inf]]), "weight holds NaN or Inf"),
        (torch.full((2, 64), 1e300, dtype=torch.float64), "weight holds NaN or Inf"),
        (torch.zeros(64), r"weight has shape \[64\]"),
        (torch.zeros(0, 64), "not empty"),
        (torch.zeros(2, 3, 4), "2-D"),
        (torch.zeros(2, 64, dtype=torch.int32), "weight has dtype int32"),
        (torch.zeros(2, 64, device="meta"), "meta device"),
        ([[1.0]], "weight is a list"),
    ],
)
def test_bad_weights_are_refused(weight, match):
    with pytest.raises(ArgumentError, match=match):
        quantize_bcq(weight, 3, 64)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"group_size": 48}, "group_size=48"),
        ({"scale_kind": "ratio"}, "scale_kind='ratio'"),
        ({"method": "gptq"}, "method='gptq'"),
        ({"scale_dtype": "float8"}, "scale_dtype='float8'"),
        ({"iters": -1}, "iters=-1"),
        ({"offsets": 1}, "offsets=1"),
        ({"nested_bits": (4,)}, "nested_bits"),
        ({"nested_bits": (2,), "scale_kind": "uniform"}, "nested_bits"),
        ({"method": "greedy", "scale_kind": "uniform"}, "method='greedy' has no integer grid"),
        ({"hessian": torch.ones(63)}, r"hessian is \[63\]"),
        ({"hessian": torch.ones(64, 63)}, "hessian"),
        ({"hessian": -torch.ones(64)}, "hessian has a negative"),
        ({"hessian": torch.full((64,), math.nan)}, "hessian has a negative, NaN"),
        ({"hessian": [1.0] * 64}, "hessian is list"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ArgumentError, match=match):
        quantize_bcq(normal(2, 64), **options)


def test_quantize_follows_the_configuration():
    weight = normal(8, 64)
    config = BCQConfig(bits=3, group_size=32, scale_kind="free", scale_dtype="bfloat16", nested_bits=(2,))
    q = quantize(weight, config)
    assert (q.bits, q.group_size, q.scale_kind) == (3, 32, "free")
    assert (q.layout.scale_dtype, q.layout.nested_bits) == ("bfloat16", (2,))
    assert quantize(weight, CodebookConfig(vec_len=2, codebook_bits=3, group_size=32)).vec_len == 2
    with pytest.raises(ArgumentError, match="config is a dict"):
        quantize(weight, {"bits": 3})


def test_weight_error_is_the_exact_sum():
    weight = normal(16, 100)
    q = quantize_bcq(weight, 2, 32)
    error, energy = weight_error(weight, q)
    assert error == pytest.approx((weight.double() - q.dequantize().double()).square().sum().item(), rel=1e-12)
    assert energy == pytest.approx(weight.double().square().sum().item(), rel=1e-12)
    with pytest.raises(ArgumentError, match="16x99, but the quantized weight is 16x100"):
        weight_error(weight[:, :99], q)


def test_a_zero_hessian_is_as_none():
    weight = normal(4, 64)
    assert torch.equal(quantize_bcq(weight, 3, 64, torch.zeros(64)).codes, quantize_bcq(weight, 3, 64).codes)
