"""codebook_mma of csrc/cuda for more than 16 tokens: how it cuts a problem, what it rounds, which kernel takes it."""

from __future__ import annotations

from itertools import product

import pytest
import test_cuda_codebook
import torch
from emulated_backend import Emulated
from test_cuda_codebook import ACCURATE, EXACT, KINDS, LAYERS, case, record, run

from lutgemm.testing.cases import OpCase
from lutgemm.testing.numerics import assert_within, exact_result, rms, rounded_allowance

emulated = test_cuda_codebook.emulated


def gemm_plan(
    m: int, n: int, k: int, group: int, kind: tuple[int, int], sms: int, shared: int = 227 << 10
) -> list[int]:
    x = torch.empty(1, 1).expand(m, k)
    return torch.ops.lutgemm_emulated._codebook_gemm_plan(x, n, group, *kind, 8, sms, shared).tolist()


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_more_than_16_tokens_share_look_ups_where_shared_memory_suffices(shared: int, emulated: Emulated) -> None:
    for planes, vec_len, m, k in product((1, 2, 3, 4, 8, 12), (2, 4, 8, 16), (16, 17, 33, 200), (16, 4096, 1 << 24)):
        token_blocks, row_blocks, splits, split_chunks, chunks, stage_chunks, copies, *used = gemm_plan(
            m, 300, k, k, (planes, vec_len), 4, shared
        )
        if splits == 0:
            assert m == 16 or planes * vec_len >= 128
            continue
        assert used[0] + 2 * used[1] <= shared
        assert copies * min(16, 2 * vec_len) in (16, 32, 64, 128)
        assert (splits - 1) * split_chunks < chunks <= splits * split_chunks
        assert 0 < stage_chunks <= split_chunks
        assert token_blocks == -(-m // 32)
        assert row_blocks == 2


def test_blocks_for_many_tokens_fill_a_gpu(emulated: Emulated) -> None:
    for (n, k), kind, m in product(LAYERS, KINDS, (32, 64, 256)):
        token_blocks, row_blocks, splits, *_ = gemm_plan(m, n, k, 128, kind, 132)
        blocks = token_blocks * row_blocks * splits
        assert blocks / (-(-blocks // 132) * 132) >= 0.7, (m, n, k, kind, blocks)


@pytest.mark.parametrize(("vec_len", "dtype"), [(4, "bfloat16"), (8, "float16")])
def test_sums_of_two_centroids_are_rounded_once_and_finite(vec_len: int, dtype: str, emulated: Emulated) -> None:
    """By identity activations and one power of two as scale; the sum of two centroids in fp16 may exceed it."""
    r = record(case(N=40, K=64, num_codebooks=2, vec_len=vec_len, group_size=0, scale_dtype=dtype))
    for largest in (1.0, 60000.0):
        books = (r.codebooks.double() * (largest / r.codebooks.double().abs().max())).to(r.codebooks.dtype)
        r = r._replace(codebooks=books, scales=torch.full_like(r.scales, 2.0**-4))
        exact = sum(books[c, r.codes[c].long()].flatten(1).double() for c in range(2)) * 2.0**-4
        for accuracy in (ACCURATE, EXACT):
            y = run(emulated, "codebook_mma", torch.eye(64, dtype=books.dtype)[:32], r, accuracy)
            assert torch.equal(y.T, exact[:, :32].to(y.dtype))


WGMMA = (
    case(M=70, N=300, K=1100, vec_len=4, group_size=128, dtype="float16", bias=True),
    case(M=130, N=33, K=384, num_codebooks=2, vec_len=8, group_size=128, dtype="bfloat16"),
    case(M=65, N=64, K=500, vec_len=8, group_size=0, dtype="bfloat16", scale_dtype="bfloat16", codebook_bits=6),
    case(M=40, N=280, K=200, num_codebooks=2, vec_len=4, group_size=64, dtype="float16", scale_dtype="bfloat16"),
)


@pytest.mark.parametrize("of", WGMMA, ids=lambda of: of.name)
def test_hopper_multiplies_many_tokens_by_warpgroups(of: OpCase, emulated: Emulated) -> None:
    """Splits and tails of all dimensions; no bank conflicts; and what it does not take goes the other way."""
    inputs, r = of.inputs(), record(of)
    truth = exact_result(inputs.x, inputs.weight, inputs.bias)
    allowed = rounded_allowance(inputs.x, inputs.weight, inputs.bias, "accurate")
    for sm_count, architecture, accuracy in ((1, 90, ACCURATE), (40, 90, ACCURATE), (4, 80, ACCURATE), (4, 90, EXACT)):
        emulated.control.set(sm_count=sm_count, architecture=architecture, counts=1)
        emulated.control.reset_counts()
        y = emulated.backend.codebook_linear(
            inputs.x, r.codes, r.codebooks, r.scales, inputs.bias, r.group_size, "codebook_mma", accuracy
        )
        own = [site for site in emulated.control.report() if site["file"] == "codebook_wgmma.cu"]
        emulated.control.set(architecture=90, counts=0)
        assert bool(own) == (architecture == 90 and accuracy == ACCURATE)
        shared = [site for site in own if site["space"] == "shared"]
        assert sum(s["cost"] for s in shared) <= 1.02 * sum(s["ideal"] for s in shared)
        assert rms(y.double() - truth) <= allowed, (sm_count, architecture, accuracy)


def test_tokens_of_warpgroups_that_are_not_finite_spoil_no_others(emulated: Emulated) -> None:
    of = WGMMA[0]
    inputs, r = of.inputs(), record(of)
    clean = run(emulated, "codebook_mma", inputs.x, r, ACCURATE)
    for bad in (float("nan"), float("inf")):
        x = inputs.x.clone()
        x[3, 5] = bad
        y = run(emulated, "codebook_mma", x, r, ACCURATE)
        assert not y[3].isfinite().any()
        others = [m for m in range(of.M) if m != 3]
        assert_within(y[others], clean[others], 0.0)
