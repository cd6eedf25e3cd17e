"""The codebook quantizer: recovery of planted codebooks, gains, any shape, refusals, determinism."""

import math

import pytest
import torch

from lutgemm import ArgumentError, CodebookConfig, CodebookWeight
from lutgemm.quantize import quantize, quantize_codebook, slabs, weight_error
from lutgemm.quantize.kmeans import assign, centroids, cluster_sums


def normal(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def relative_error(weight, q):
    error, energy = weight_error(weight, q)
    return error / energy


def test_a_planted_codebook_is_found():
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(16, 4, generator=generator)
    weight = book[torch.randint(0, 16, (64, 32), generator=generator)].flatten(1)
    q = quantize_codebook(weight, vec_len=4, codebook_bits=5, group_size="row", scale_dtype="float32")
    # Rows are scaled by their own RMS first, so that the copies of a centroid are only nearly equal.
    assert relative_error(weight, q) < 1e-4


def test_fewer_vectors_than_centroids_are_exact():
    weight = normal(2, 16)
    q = quantize_codebook(weight, vec_len=4, codebook_bits=8, group_size="row", scale_dtype="float32")
    assert q.codebooks.shape == (1, 256, 4)
    assert relative_error(weight, q) < 1e-9


def test_error_of_normal_weights():
    """Rate-distortion bounds squared error of R bits by 4**-R; k-means of 2 bits in 4 dimensions comes to about 0.1."""
    weight = normal(256, 512)
    error = relative_error(weight, quantize_codebook(weight))
    assert 4.0**-2.2 < error < 0.105


def test_two_codebooks_beat_one():
    weight = normal(128, 256)
    one = relative_error(weight, quantize_codebook(weight, 1, 4, 6))
    two = relative_error(weight, quantize_codebook(weight, 2, 4, 6))
    three = relative_error(weight, quantize_codebook(weight, 3, 4, 6))
    assert two < 0.3 * one
    assert three < 0.4 * two


def test_more_rounds_are_no_worse():
    weight = normal(128, 256) * (1 + 5 * (normal(128, 256, 1) > 2))
    errors = [relative_error(weight, quantize_codebook(weight, 2, 4, 5, iters=i)) for i in (1, 3, 20)]
    assert errors[2] < errors[1] < errors[0]


def test_groups_of_any_magnitude_share_the_codebook():
    weight = normal(64, 256)
    magnitude = torch.logspace(-3, 3, 64)[:, None]
    plain = relative_error(weight, quantize_codebook(weight, codebook_bits=6, group_size="row"))
    scaled = quantize_codebook(weight * magnitude, codebook_bits=6, group_size="row").dequantize() / magnitude
    # The loudest rows train the codebook, so the quiet ones may fare a little worse.
    assert (scaled - weight).square().sum() / weight.square().sum() < 1.3 * plain


@pytest.mark.parametrize("shape", ["diagonal", "full"])
def test_hessian_weights_the_error(shape):
    weight = normal(64, 128)
    diagonal = torch.where(torch.arange(128) % 4 == 0, 25.0, 1.0)
    hessian = diagonal if shape == "diagonal" else torch.diag(diagonal) + 0.01

    def weighted(q):
        return ((weight - q.dequantize()).square() * diagonal).sum()

    aware = quantize_codebook(weight, codebook_bits=6, hessian=hessian)
    assert weighted(aware) < 0.8 * weighted(quantize_codebook(weight, codebook_bits=6))


@pytest.mark.parametrize(
    ("n", "k", "vec_len", "group_size"),
    [
        (1, 1, 4, "row"),
        (3, 7, 4, "row"),
        (5, 100, 8, 32),
        (2, 33, 2, 8),
        (7, 130, 16, 64),
        (4, 64, 8, 128),
        (9, 30, 4, 8),
    ],
)
@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_any_shape(n, k, vec_len, group_size, num_codebooks):
    weight = normal(n, k)
    q = quantize_codebook(weight, num_codebooks, vec_len, 6, group_size)
    assert q.codes.shape == (num_codebooks, n, math.ceil(k / vec_len))
    assert q.scales.shape == (n, math.ceil(k / q.group_size))
    assert relative_error(weight, q) < 0.5
    again = CodebookWeight.from_state_dict(q.state_dict())
    assert torch.equal(again.dequantize(), q.dequantize())


@pytest.mark.parametrize("codebook_bits", [1, 2, 5, 8, 9])
def test_every_codebook_width(codebook_bits):
    weight = normal(32, 128)
    q = quantize_codebook(weight, 1, 4, codebook_bits, 64, iters=4)
    assert q.codes.dtype == (torch.uint8 if codebook_bits <= 8 else torch.int16)
    assert relative_error(weight, q) < 1.35 * 4.0 ** (-codebook_bits / 4)
    q.check_values()


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_scale_dtypes(scale_dtype):
    weight = normal(32, 128).to(torch.bfloat16)
    q = quantize_codebook(weight, codebook_bits=6, scale_dtype=scale_dtype)
    assert q.scales.dtype == q.codebooks.dtype == getattr(torch, scale_dtype)
    assert relative_error(weight, q) < 0.25


def test_zero_groups_are_exact_zeros():
    weight = normal(8, 256)
    weight[2:4] = 0
    weight[5, 128:] = 0
    q = quantize_codebook(weight, codebook_bits=4)
    assert not q.dequantize()[weight == 0].any()
    assert not quantize_codebook(torch.zeros(4, 64)).dequantize().any()


@pytest.mark.parametrize("factor", [1e-6, 1e4])
def test_small_and_large_weights(factor):
    weight = normal(16, 128)
    error = relative_error(weight * factor, quantize_codebook(weight * factor, codebook_bits=6))
    assert error < 1.15 * relative_error(weight, quantize_codebook(weight, codebook_bits=6))


def test_overflow_of_the_scale_dtype_names_the_remedy():
    weight = normal(4, 64) * 1e6
    with pytest.raises(ArgumentError, match=r'scale_dtype="float16" overflows.*use scale_dtype="float32"'):
        quantize_codebook(weight, codebook_bits=4)
    assert relative_error(weight, quantize_codebook(weight, codebook_bits=4, scale_dtype="float32")) < 0.5


def test_same_bytes_every_run_and_another_seed_differs():
    weight = normal(32, 200)

    def state(seed):
        return quantize_codebook(weight, 2, 4, 4, 32, iters=5, seed=seed).state_dict()

    first = state(7)
    torch.manual_seed(123)
    for _ in range(20):
        assert all(torch.equal(first[name], tensor) for name, tensor in state(7).items())
    assert not torch.equal(first["codebooks"], state(8)["codebooks"])


def test_slabs_change_nothing_that_matters(monkeypatch):
    weight = normal(48, 128)
    whole = quantize_codebook(weight, codebook_bits=5)
    monkeypatch.setattr(slabs, "SLAB_ELEMENTS", 128 * 5)
    parts = quantize_codebook(weight, codebook_bits=5)
    assert torch.equal(whole.codebooks, parts.codebooks)
    assert relative_error(weight, parts) == pytest.approx(relative_error(weight, whole), rel=1e-3)


def test_nonfinite_weights_are_refused_wherever_they_are():
    for row, column in ((0, 0), (2999, 127)):
        weight = normal(3000, 128)
        weight[row, column] = math.nan
        with pytest.raises(ArgumentError, match="weight holds NaN or Inf"):
            quantize_codebook(weight, codebook_bits=2, iters=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_codebooks": 0}, "num_codebooks=0"),
        ({"vec_len": 3}, "vec_len=3"),
        ({"codebook_bits": 13}, "codebook_bits=13"),
        ({"group_size": 30}, "group_size=30"),
        ({"scale_dtype": "int8"}, "scale_dtype='int8'"),
        ({"iters": 0}, "iters=0"),
        ({"seed": -1}, "seed=-1"),
        ({"hessian": torch.ones(3)}, r"hessian is \[3\]"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ArgumentError, match=match):
        quantize_codebook(normal(2, 64), **options)


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(2, 0), torch.ones(2, 4, dtype=torch.int64)])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ArgumentError, match="weight has"):
        quantize_codebook(weight)


def test_quantize_follows_the_configuration():
    weight = normal(8, 64)
    config = CodebookConfig(num_codebooks=2, vec_len=2, codebook_bits=3, group_size=32, iters=2, seed=5)
    q = quantize(weight, config)
    same = quantize_codebook(weight, 2, 2, 3, 32, iters=2, seed=5)
    assert q.layout == same.layout
    assert torch.equal(q.dequantize(), same.dequantize())


@pytest.mark.parametrize("weighted", [False, True])
def test_assign_finds_the_nearest(weighted):
    vectors, book = normal(500, 4), normal(64, 4, 1)
    weights = normal(500, 4, 2).square() + 0.1 if weighted else torch.ones(500, 4)
    distance = ((vectors[:, None] - book).square() * weights[:, None]).sum(-1)
    chosen = distance.gather(1, assign(vectors, weights if weighted else None, book)[:, None])[:, 0]
    # 6 low bits of a distance hold the number, and a 1e-4 share of |x|^2 is added before.
    assert (chosen <= distance.amin(-1) * (1 + 2.0**-16) + 1e-5).all()


def test_centroids_are_weighted_means_and_unused_ones_stay():
    vectors, weights = normal(20, 2), normal(20, 2, 1).square()
    codes = torch.arange(20) % 3
    book = torch.full((4, 2), 9.0)
    means = centroids(vectors, weights, codes, book)
    for entry in range(3):
        own = codes == entry
        torch.testing.assert_close(means[entry], (vectors * weights)[own].sum(0) / weights[own].sum(0))
    assert torch.equal(means[3], book[3])
    assert cluster_sums(torch.ones(20, 1), torch.ones(20, 1), codes, 4)[:, 1].tolist() == [7, 7, 6, 0]
