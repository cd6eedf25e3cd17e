"""codegemm and codebook_mma of csrc/cuda: their layouts, how they cut a problem, bank conflicts, bad arguments.

What they compute is checked by test_cuda_emulated.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import emulated_backend
import pytest
import torch
from conftest import REQUIRED
from emulated_backend import Emulated
from torch import Tensor

from lutgemm.accuracy import resolve_accuracy
from lutgemm.backends.gpu_layouts import CodebookRecord
from lutgemm.backends.gpu_layouts.codebook import (
    codegemm_codes,
    codegemm_scales,
    mma_codes,
    mma_scales,
    mma_tables,
    mma_terms,
)
from lutgemm.formats import CodebookWeight
from lutgemm.testing.cases import OpCase
from lutgemm.testing.numerics import assert_within, exact_result, rms, torch_allowance

FLOAT, INT16, PAIR14, HALF_FLOAT = range(4)
EXACT, NEAR_EXACT, ACCURATE = (resolve_accuracy(name) for name in ("exact", "near-exact", "accurate"))


@pytest.fixture(scope="module")
def emulated() -> Iterator[Emulated]:
    if emulated_backend.compiler() is None:
        if "emulator" in REQUIRED:
            pytest.fail("--require emulator: no g++ is on PATH")
        pytest.skip("no g++ is on PATH")
    built = emulated_backend.emulated()
    yield built
    built.control.set(counts=0, sm_count=4, architecture=90)


def case(**changes: object) -> OpCase:
    return OpCase(**{"op": "codebook_linear", "codebook_bits": 8, "dtype": "float16"} | changes)


def record(of: OpCase, tier: str = "random") -> CodebookRecord:
    w = of.weight(tier)
    return CodebookRecord(w.codes, w.codebooks, w.scales, of.K, w.group_size)


def run(built: Emulated, algorithm: str, x: Tensor, r: CodebookRecord, accuracy: int) -> Tensor:
    return built.backend.codebook_linear(x, r.codes, r.codebooks, r.scales, None, r.group_size, algorithm, accuracy)


def test_codes_of_codegemm_lie_in_units_of_one_group() -> None:
    """Of 3 codebooks and groups of 3 slices, 9 columns of a group make 3 units, the last with one column."""
    r = record(case(N=37, K=13 * 3 * 4 + 5, num_codebooks=3, group_size=12))
    (codes,) = codegemm_codes(r)
    assert codes.shape == (2, 16, 32, 4, 4)
    assert codes.dtype == torch.uint8
    for n, j, c in product(range(37), range(r.codes.shape[2]), range(3)):
        column = j % 3 * 3 + c
        unit = j // 3 * 3 + column // 4
        assert codes[unit // 32, n // 4, unit % 32, n % 4, column % 4] == r.codes[c, n, j]
    assert int(codes.bool().sum()) == int(r.codes.bool().sum()), "the rest is code 0"


def test_wide_codes_of_codegemm_lie_by_rows() -> None:
    r = record(case(N=33, K=50, codebook_bits=11))
    (codes,) = codegemm_codes(r)
    assert codes.shape == (4, 64, 4)
    assert codes.dtype == torch.int16
    for n, j in product(range(33), range(13)):
        assert codes[j // 8 * 2 + j % 8 // 4, n, j % 4] == r.codes[0, n, j]


@pytest.mark.parametrize(
    ("num_codebooks", "vec_len", "terms"), [(1, 4, 1), (2, 8, 1), (3, 2, 1), (1, 16, 2), (4, 2, 3)]
)
def test_codes_of_codebook_mma_lie_in_steps_of_one_group(num_codebooks: int, vec_len: int, terms: int) -> None:
    r = record(case(N=21, K=100, num_codebooks=num_codebooks, vec_len=vec_len, group_size=48))
    (codes,) = mma_codes(r, terms)
    slots, vectors = max(1, 4 // vec_len), 48 // vec_len
    items = 1 << (terms * num_codebooks * slots - 1).bit_length()
    steps_of_group = -(-vectors // (4 * slots))
    assert codes.shape[0] == 2
    assert codes.shape[2:] == (32, 8, 2)
    for n, j, c, term in product(range(21), range(r.codes.shape[2]), range(num_codebooks), range(terms)):
        within = j % vectors
        step = j // vectors * steps_of_group + within // (4 * slots)
        item = step * items + (term * num_codebooks + c) * slots + within % slots
        lane = n % 8 * 4 + within % (4 * slots) // slots
        assert codes[n // 16, item // 8, lane, item % 8, n % 16 // 8] == r.codes[c, n, j]
    assert int(codes.bool().sum()) == terms * int(r.codes.bool().sum()), "the rest is code 0"


def test_scales_of_codebook_mma_lie_by_columns_of_a_fragment() -> None:
    r = record(case(N=45, K=100, group_size=32))
    scales, unit = mma_scales(r, exact=False)
    assert scales.shape == (2, 4, 4, 4, 2)
    assert 2**14 <= scales.max() < 2**15
    for n, g in product(range(45), range(4)):
        assert scales[n // 32, g, n % 8 // 2, n % 32 // 8, n % 2].float() * unit == r.scales[n, g].float()


@pytest.mark.parametrize("peak", [1.0, 2.0**-100, 2.0**100, 0.0])
def test_bf16_scales_are_kept_as_fp16_and_a_power_of_two(peak: float) -> None:
    values = torch.tensor([[1.0, 2.0**-29 * 1.5], [0.75, 0.0]]) * peak
    r = record(case(N=2, K=8, group_size=4, scale_dtype="bfloat16"))._replace(scales=values.bfloat16())
    scales, _, norms = codegemm_scales(r, exact=False)
    assert scales.dtype == torch.float16
    assert torch.equal(scales[:, :2].T.double() * norms[1].double(), values.double())
    exact, _, norms = codegemm_scales(r, exact=True)
    assert norms[1] == 1
    assert torch.equal(exact[:, :2].T, values)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_codebooks_are_kept_in_units_of_their_largest_value(scale_dtype: str) -> None:
    r = record(case(N=8, K=64, num_codebooks=3, codebook_bits=2, scale_dtype=scale_dtype))
    books = r.codebooks * torch.tensor([1.0, 2.0**-10, 0.0])[:, None, None].to(r.codebooks.dtype)
    _, codebooks, norms = codegemm_scales(r._replace(codebooks=books), exact=False)
    assert codebooks.shape == (3, 8, 4)
    assert ((codebooks[:2].abs().amax((1, 2)) >= 1) & (codebooks[:2].abs().amax((1, 2)) < 2)).all()
    assert torch.equal(codebooks[:, :4].float() * norms[4:, None, None], books.float())
    assert not codebooks[:, 4:].any()
    assert norms[6] < 2.0**-99, "so that no x overflows in units of an empty codebook"


def test_norms_are_bounds() -> None:
    r = record(case(N=8, K=64, num_codebooks=2))
    _, _, norms = codegemm_scales(r, exact=True)
    largest = r.codebooks.double().norm(dim=2).amax(1)
    assert (norms[:2] >= largest).all()
    assert (norms[:2] <= largest * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("codebook", "x", "exact_terms", "error"),
    [
        ("float16", "float16", 1, 0.0),
        ("bfloat16", "bfloat16", 1, 0.0),
        ("bfloat16", "float16", 1, 0.0),
        ("float16", "bfloat16", 2, 0.0),
        ("float32", "float16", 2, 2.0**-23),
        ("float32", "bfloat16", 3, 0.0),
    ],
)
def test_tables_of_codebook_mma_add_up_to_the_codebook(codebook: str, x: str, exact_terms: int, error: float) -> None:
    r = record(case(N=8, K=64, scale_dtype=codebook))
    dtype = getattr(torch, x)
    assert mma_terms(r.codebooks.dtype, dtype, EXACT) == exact_terms
    assert mma_terms(r.codebooks.dtype, dtype, ACCURATE) == 1
    for accuracy, most in ((EXACT, error), (NEAR_EXACT, max(error, 2.0**-17)), (ACCURATE, 2.0**-8)):
        terms = mma_terms(r.codebooks.dtype, dtype, accuracy)
        tables, unit = mma_tables(r, dtype, terms)
        assert tables.dtype == dtype
        total = tables.double().view(terms, *r.codebooks.shape).sum(0) * unit.double()
        assert ((total - r.codebooks.double()).abs() <= most * r.codebooks.double().abs()).all()


LAYERS = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192), (8192, 28672))
KINDS = ((1, 4), (2, 8), (1, 8))


def codegemm_plan(
    m: int,
    n: int,
    k: int,
    kind: tuple[int, int],
    bits: int,
    accuracy: int,
    floats: bool,
    sms: int,
    shared: int = 227 << 10,
    group: int = 128,
) -> list[int]:
    x = torch.empty(1, 1).expand(m, k)
    op = torch.ops.lutgemm_emulated._codegemm_plan
    return op(x, n, group, *kind, bits, accuracy, floats, sms, shared).tolist()


def mma_plan(
    m: int, n: int, k: int, group: int, kind: tuple[int, int], sms: int, shared: int = 227 << 10, bits: int = 8
) -> list[int]:
    x = torch.empty(1, 1).expand(m, k)
    return torch.ops.lutgemm_emulated._codebook_mma_plan(x, n, group, *kind, bits, sms, shared).tolist()


def test_words_of_codegemm_follow_accuracy_and_tokens(emulated: Emulated) -> None:
    def word(m: int, accuracy: int, floats: bool = False, bits: int = 8, shared: int = 163 << 10) -> tuple[int, int]:
        found = codegemm_plan(m, 64, 256, (1, 4), bits, accuracy, floats, 4, shared)
        return found[0], found[1]

    assert word(1, ACCURATE) == (INT16, 1)
    assert word(2, ACCURATE) == (PAIR14, 2)
    assert word(2, ACCURATE, shared=99 << 10) == (INT16, 1)
    assert word(2, NEAR_EXACT) == (INT16, 1)
    assert word(2, EXACT, True) == (FLOAT, 1)
    assert word(2, EXACT, True, shared=99 << 10) == (HALF_FLOAT, 1)
    assert word(2, ACCURATE, True, 12) == (FLOAT, 1)
    assert word(2, ACCURATE, True, 12, shared=99 << 10) == (FLOAT, 1)


def test_codegemm_cuts_cover_the_problem(emulated: Emulated) -> None:
    for m, n, k, bits, sms in product((1, 2, 7, 40), (1, 33, 4096), (1, 300, 14336), (8, 9, 12), (1, 132)):
        for limit, accuracy in ((163 << 10, ACCURATE), (163 << 10, EXACT), (99 << 10, EXACT)):
            floats = bits > 8 or accuracy == EXACT
            word, _, splits, row_blocks, shared, workspace = codegemm_plan(
                m, n, k, (1, 4), bits, accuracy, floats, sms, limit
            )
            units = -(-k // 128) * 8 if k > 128 else -(-k // 16)
            per_split = 4096 >> bits if bits > 8 else 16 if word == HALF_FLOAT else 32
            assert splits * per_split >= units - 7
            assert 1 <= row_blocks <= -(-n // 32), "no block without rows"
            assert shared <= limit
            assert workspace == 4 * splits * min(m, 16) * n


def test_layers_of_models_fill_a_gpu(emulated: Emulated) -> None:
    """Nearly as many blocks as multiprocessors in each round, and rows enough to be worth a table."""
    for (n, k), kind in product(LAYERS, KINDS):
        _, _, tiles, row_blocks, _, _ = codegemm_plan(1, n, k, kind, 8, ACCURATE, False, 132)
        blocks = tiles * row_blocks
        assert blocks / (-(-blocks // 132) * 132) >= 0.8, (n, k, kind, blocks)
        assert n / row_blocks >= 120, (n, k, kind)
        _, splits, split_chunks, chunks, mma_blocks, _, *shared = mma_plan(8, n, k, 128, kind, 132)
        assert (splits - 1) * split_chunks < chunks <= splits * split_chunks
        assert 0.7 * 132 <= splits * mma_blocks <= 132, (n, k, kind)
        assert sum(shared) <= 227 << 10


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_codebook_mma_fits_in_shared_memory_or_says_that_it_does_not(shared: int, emulated: Emulated) -> None:
    for planes, vec_len, m, k in product((1, 2, 3, 4, 8, 12), (2, 4, 8, 16), (1, 8, 16, 40), (16, 4096, 1 << 24)):
        octets, splits, split_chunks, chunks, _, copies, *used = mma_plan(m, 64, k, k, (planes, vec_len), 4, shared)
        if splits == 0:
            assert planes * vec_len >= 128, "256 entries in 16 bytes each fit"
            continue
        assert sum(used) <= shared
        assert copies * min(16, 2 * vec_len) in (16, 32, 64, 128)
        assert (splits - 1) * split_chunks < chunks <= splits * split_chunks
        assert octets == (2 if m > 8 and vec_len in (4, 8) else 1)


@pytest.mark.parametrize(
    ("algorithm", "m", "accuracy", "num_codebooks", "vec_len", "wavefronts"),
    [
        ("codegemm", 1, "accurate", 1, 4, 1),
        ("codegemm", 1, "exact", 2, 8, 1),
        ("codegemm", 2, "accurate", 4, 2, 1),
        ("codegemm", 1, "accurate", 3, 2, 1),
        ("codebook_mma", 1, "accurate", 1, 2, 1),
        ("codebook_mma", 8, "accurate", 1, 4, 2),
        ("codebook_mma", 16, "accurate", 2, 8, 4),
        ("codebook_mma", 5, "accurate", 1, 16, 4),
        ("codebook_mma", 30, "accurate", 1, 4, 2),
        ("codebook_mma", 20, "accurate", 2, 8, 4),
        ("codebook_mma", 17, "accurate", 1, 2, 1),
    ],
)
def test_shared_memory_without_bank_conflicts(
    algorithm: str, m: int, accuracy: str, num_codebooks: int, vec_len: int, wavefronts: int, emulated: Emulated
) -> None:
    """Every access, and of a warp's look-up the wavefronts that its kernel derives."""
    of = case(M=m, N=64, K=1024, num_codebooks=num_codebooks, vec_len=vec_len, group_size=128, accuracy=accuracy)
    x, r = of.inputs().x, record(of)
    run(emulated, algorithm, x, r, resolve_accuracy(accuracy))  # makes the layout
    emulated.control.set(counts=1, sm_count=1)
    emulated.control.reset_counts()
    run(emulated, algorithm, x, r, resolve_accuracy(accuracy))
    sites = [site for site in emulated.control.report() if site["file"].startswith(("code", "psum"))]
    emulated.control.set(counts=0)
    shared = [site for site in sites if site["space"] == "shared"]
    assert sum(s["cost"] for s in shared) <= 1.02 * sum(s["ideal"] for s in shared), "all but what is done once a tile"
    if algorithm == "codegemm":
        reads = [s for s in shared if not s["write"] and s["file"] == "codegemm.cuh"]
        look_ups = -(-1024 // vec_len * num_codebooks // 128) * 128 * 64 // 32  # whole tiles of 128 columns
    else:
        reads = [s for s in shared if not s["write"] and s["file"] == "codebook_mma.cuh"]
        parts = 2 if vec_len == 16 else 1
        look_ups = 1024 // vec_len * num_codebooks * 64 // 32 * parts
    assert sum(s["accesses"] for s in reads) == look_ups
    assert sum(s["cost"] for s in reads) == look_ups * wavefronts


@pytest.mark.parametrize("algorithm", ["codegemm", "codebook_mma"])
def test_any_cut_gives_the_result(algorithm: str, emulated: Emulated) -> None:
    """Groups that tiles and chunks straddle, blocks of many and of few rows, passes of tokens."""
    shapes = ((1, 1, 4, 36), (3, 3, 2, 6), (19, 2, 8, 40), (9, 4, 16, 0), (2, 1, 4, 4), (38, 3, 4, 12), (37, 4, 2, 0))
    for m, num_codebooks, vec_len, group_size in shapes if algorithm == "codebook_mma" else shapes[:5]:
        of = case(M=m, N=75, K=1310, num_codebooks=num_codebooks, vec_len=vec_len, group_size=group_size)
        inputs = of.inputs()
        assert isinstance(inputs.weight, CodebookWeight)
        truth, allowed = exact_result(inputs.x, inputs.weight), torch_allowance(inputs.x, inputs.weight, None)
        for sm_count, architecture in ((1, 80), (40, 90)):
            emulated.control.set(sm_count=sm_count, architecture=architecture)
            y = run(emulated, algorithm, inputs.x, record(of), EXACT)
            assert rms(y.double() - truth) <= allowed, of.name


@pytest.mark.parametrize("m", [1, 2])
def test_tokens_that_are_not_finite_spoil_no_others(m: int, emulated: Emulated) -> None:
    of = case(M=m + 1, N=40, K=96, group_size=32)
    inputs, r = of.inputs(), record(of)
    clean = run(emulated, "codegemm", inputs.x, r, ACCURATE)
    for bad in (float("nan"), float("inf")):
        x = inputs.x.clone()
        x[0, 5] = bad
        y = run(emulated, "codegemm", x, r, ACCURATE)
        assert not y[0].isfinite().any()
        assert_within(y[1:], clean[1:], 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_dtype": "float32"},
        {"num_codebooks": 3, "vec_len": 16},
        {"num_codebooks": 2, "vec_len": 8, "group_size": 24},
        {"vec_len": 2, "group_size": 0, "codebook_bits": 5},
        {"codebook_bits": 12},
    ],
)
def test_a_gpu_with_99_kb_of_shared_memory_refuses_nothing(changes: dict, emulated: Emulated) -> None:
    """As sm_86, sm_89 and sm_120 have it: fp32 tables are made of half a tile's columns."""
    for m, dtype in ((3, "float32"), (1, "float16")):
        of = case(M=m, N=75, K=1310 if changes.get("group_size") else 384, dtype=dtype, **changes)
        inputs, r = of.inputs(), record(of)
        assert isinstance(inputs.weight, CodebookWeight)
        truth, allowed = exact_result(inputs.x, inputs.weight), torch_allowance(inputs.x, inputs.weight, None)
        emulated.control.set(architecture=86, sm_count=3)
        try:
            y = run(emulated, "codegemm", inputs.x, r, EXACT)
        finally:
            emulated.control.set(architecture=90, sm_count=4)
        assert rms(y.double() - truth) <= allowed, of.name


BASE = {"N": 20, "K": 100, "group_size": 32}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"codes": torch.zeros(1, 8, 32, 4, 3, dtype=torch.uint8)}, "codes: got shape"),
        ({"codes": torch.zeros(1, 8, 32, 4, 4)}, "codes: has another dtype"),
        ({"scales": torch.zeros(4, 16, dtype=torch.float16)}, "scales: got shape"),
        ({"scales": torch.zeros(4, 32, dtype=torch.bfloat16)}, "scales: has another dtype"),
        ({"codebooks": torch.zeros(1, 60, 4).half()}, "60 centroids: must be a power of two"),
        ({"codebooks": torch.zeros(1, 256, 4)}, "codebooks: has another dtype"),
        ({"codebooks": torch.zeros(1, 4, 4).half()}, "at least 8 centroids"),
        ({"codebooks": torch.zeros(1, 256, 3).half()}, "vec_len=3"),
        ({"codebooks": torch.zeros(5, 256, 4).half()}, "num_codebooks\\)=5"),
        ({"norms": torch.zeros(1)}, "norms: got shape"),
        ({"N": 40}, "codes: got shape"),
        ({"group_size": 34}, "group_size=34: must be a multiple of vec_len=4"),
        ({"accuracy": 4}, "accuracy=4"),
        ({"x": torch.zeros(1, 2, 100)}, "x: got shape"),
        ({"bias": torch.zeros(19)}, "bias: got shape"),
    ],
)
def test_codegemm_checks_its_arguments(changes: dict, text: str, emulated: Emulated) -> None:
    r = record(case(**BASE))
    (codes,) = codegemm_codes(r)
    scales, codebooks, norms = codegemm_scales(r, exact=False)
    given = {"x": torch.zeros(1, 100), "codes": codes, "scales": scales, "codebooks": codebooks, "norms": norms}
    given |= {"bias": None, "N": 20, "group_size": 32, "accuracy": 1} | changes
    with pytest.raises(RuntimeError, match=text):
        torch.ops.lutgemm_emulated._codebook_codegemm_cuda(**given)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"x": torch.zeros(1, 100)}, "x: must be float16 or bfloat16"),
        ({"codes": torch.zeros(2, 1, 32, 8, 1, dtype=torch.uint8)}, "codes: got shape"),
        ({"scales": torch.zeros(1, 4, 8, 4, dtype=torch.float16)}, "scales: got shape"),
        ({"tables": torch.zeros(1, 256, 4)}, "tables: has another dtype"),
        (
            {"tables": torch.zeros(1, 512, 4, dtype=torch.float16)},
            "512 centroids: must be a power of two from 2 to 256",
        ),
        ({"units": torch.zeros(1)}, "units: got shape"),
    ],
)
def test_codebook_mma_checks_its_arguments(changes: dict, text: str, emulated: Emulated) -> None:
    r = record(case(**BASE))
    (codes,), (scales, unit) = mma_codes(r, 1), mma_scales(r, exact=False)
    tables, _ = mma_tables(r, torch.float16, 1)
    given = {"x": torch.zeros(1, 100, dtype=torch.float16), "codes": codes, "scales": scales, "tables": tables}
    given |= {"half_tables": None, "units": unit.repeat(3), "bias": None, "N": 20, "group_size": 32} | changes
    with pytest.raises(RuntimeError, match=text):
        torch.ops.lutgemm_emulated._codebook_codebook_mma_cuda(**given)
