"""LUT-GEMM and BiQGEMM of csrc/cuda: their layout, how they cut a problem, bank conflicts, tables in a row.

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
from lutgemm.backends.gpu_layouts import BcqRecord
from lutgemm.backends.gpu_layouts.lut import folded_codes, layout, narrowed, tiled_codes, unit_groups
from lutgemm.formats.bcq import pack_bits, unpack_signs
from lutgemm.testing.cases import OpCase
from lutgemm.testing.numerics import assert_equal, exact_result


@pytest.fixture(scope="module")
def emulated() -> Iterator[Emulated]:
    if emulated_backend.compiler() is None:
        if "emulator" in REQUIRED:
            pytest.fail("--require emulator: no g++ is on PATH")
        pytest.skip("no g++ is on PATH")
    built = emulated_backend.emulated()
    yield built
    built.control.set(counts=0, sm_count=4)


def record(case: OpCase, tier: str = "random") -> BcqRecord:
    w = case.weight(tier)
    return BcqRecord(w.codes, w.scales, w.offsets, w.zeros, w.ratios, case.K, w.group_size, case.scale_kind)


def run(built: Emulated, case: OpCase, algorithm: str, x: Tensor, tier: str = "random") -> Tensor:
    r = record(case, tier)
    weight = (r.codes, r.scales, r.offsets, r.zeros, r.ratios)
    arguments = (None, r.group_size, r.scale_kind, algorithm, resolve_accuracy(case.accuracy))
    return built.backend.bcq_linear(x, *weight, *arguments)


def test_a_folded_byte_is_an_entry_with_plus_at_input_7_and_a_sign() -> None:
    octets = torch.arange(256, dtype=torch.uint8)
    words = octets.view(torch.int32).reshape(1, 64)
    plain = unpack_signs(words, 2048).view(256, 8)
    folded = folded_codes(words).view(torch.uint8).flatten()
    entries = unpack_signs(folded.view(torch.int32).reshape(1, 64), 2048).view(256, 8)
    negated = folded >= 128
    entries[:, 7] = 1
    assert torch.equal(torch.where(negated[:, None], -entries, entries), plain)


def test_codes_lie_in_the_order_in_which_a_warp_reads_them() -> None:
    bits, n, k = 2, 35, 2100
    codes = pack_bits(torch.randint(0, 2, (bits, n, k), generator=torch.Generator().manual_seed(1), dtype=torch.uint8))
    tiled, folded = tiled_codes(codes), folded_codes(codes)
    assert tiled.shape == (3, 3, bits, 512)
    for b, row, word in product(range(bits), range(n), (0, 1, 31, 32, 65)):
        place = row % 16 // 4 * 128 + word % 32 * 4 + row % 4
        assert tiled[row // 16, word // 32, b, place] == folded[b, row, word]


@pytest.mark.parametrize(
    ("in_features", "group_size", "first", "slots"),
    [
        (4096, 128, [0, 8, 16, 24], 8),
        (4096, 4096, [0, 0, 0, 0], 1),
        (3000, 96, [0, 10, 21], 12),
        (100, 32, [0], 4),
        (1, 64, [0], 1),
    ],
)
def test_groups_of_a_unit_of_inputs(in_features: int, group_size: int, first: list[int], slots: int) -> None:
    assert unit_groups(in_features, group_size) == (first, slots)


def test_scales_lie_by_quads_of_rows_and_by_the_groups_of_a_unit() -> None:
    case = OpCase(N=21, K=1500, bits=2, group_size=96)
    r = record(case)
    _, scales, unit = layout(r)
    assert scales.dtype == torch.float16
    assert scales.shape == (2, 2, 3, 4, 11, 4)
    assert unit.tolist() == [1.0]
    terms = torch.cat((r.scales, r.offsets[None]))
    for term, row, group in product(range(3), range(21), range(terms.shape[2])):
        touched = [u for u in (0, 1) if 1024 * u <= 96 * group + 95 and 96 * group < 1024 * (u + 1)]
        places = [(u, group - 1024 * u // 96) for u in touched]
        assert places
        for u, slot in places:
            assert scales[row // 16, u, term, row % 16 // 4, slot, row % 4] == terms[term, row, group]
    assert scales[1, :, :, 1, :, 1:].eq(0).all()
    assert scales[1, :, :, 2:].eq(0).all()


def test_scales_are_kept_in_fp16_where_that_is_exact() -> None:
    for exponent in (-23, -3, 0, 15):
        terms = torch.tensor([[1.0, -0.5, 0.0]]) * 2.0**exponent
        narrow, unit = narrowed(terms, 1) or pytest.fail(f"2**{exponent}")
        assert unit == 1
        assert torch.equal(narrow.float(), terms)
    for exponent in (-60, 40):
        terms = torch.tensor([[1.5, -0.25], [3.0, 7.0]]) * torch.tensor([[2.0**exponent], [1.0]])
        narrow, unit = narrowed(terms, 1) or pytest.fail(f"2**{exponent}")
        assert torch.equal(narrow.float() * torch.tensor([[unit], [1.0]]), terms)
    assert narrowed(torch.zeros(1, 2), 1) is not None
    assert narrowed(torch.tensor([[1.0, 2.0**-40]]), 1) is None, "too wide a range"
    assert narrowed(torch.tensor([[1.0 + 2.0**-20]]), 1) is None, "too many digits"


@pytest.mark.parametrize(
    ("kind", "scale_dtype", "zeros_dtype", "dtype", "terms"),
    [
        ("free", "float16", "uint8", torch.float16, 4),
        ("free", "bfloat16", "uint8", torch.float16, 4),
        ("free", "float32", "uint8", torch.float32, 4),
        ("ratio", "float16", "uint8", torch.float32, 4),
        ("uniform", "float16", "uint8", torch.float16, 2),
        ("uniform", "bfloat16", "uint8", torch.float16, 2),
        ("uniform", "float32", "float32", torch.float32, 4),
    ],
)
def test_terms_of_every_kind(kind: str, scale_dtype: str, zeros_dtype: str, dtype: torch.dtype, terms: int) -> None:
    case = OpCase(bits=3, scale_kind=kind, scale_dtype=scale_dtype, zeros_dtype=zeros_dtype)
    _, scales, _ = layout(record(case))
    assert scales.dtype == dtype
    assert scales.shape[2] == terms


CUTS = list(product((1, 2, 7, 40), (1, 100, 4096, 28672), (1, 1024, 4096, 14336), (1, 4), (1, 108, 132)))
TABLES = ((1, 4), (2, 8), (4, 16), (2, 4), (4, 8), (8, 16))


def plan(m: int, n: int, k: int, bits: int, tables: tuple[int, int], sm_count: int) -> list[int]:
    return torch.ops.lutgemm_emulated._lut_plan(torch.empty(m, k), n, bits, *tables, sm_count).tolist()


@pytest.mark.parametrize("tables", TABLES)
def test_a_cut_covers_the_problem_without_empty_blocks(tables: tuple[int, int], emulated: Emulated) -> None:
    tokens, entry_bytes = tables
    for m, n, k, bits, sm_count in CUTS:
        row_blocks, tiles, splits, tables_per_split, token_blocks = plan(m, n, k, bits, tables, sm_count)
        all_tiles, all_tables = -(-n // 16), -(-k * entry_bytes // 4096)
        assert (row_blocks - 1) * tiles < all_tiles <= row_blocks * tiles
        assert (splits - 1) * tables_per_split < all_tables <= splits * tables_per_split
        assert token_blocks == -(-m // tokens)
        assert tiles * 16 * tokens <= 4096, "results in shared memory"
        assert row_blocks <= 65535, "of a grid"
        assert splits <= 1024


def test_layers_of_models_fill_a_gpu(emulated: Emulated) -> None:
    """At least one block for nearly each multiprocessor, even ones, and enough rows to be worth a table."""
    for (n, k), (m, tables), bits in product(
        ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (8192, 28672)),
        ((1, (1, 4)), (4, (4, 8)), (8, (8, 16))),
        (1, 2, 4),
    ):
        row_blocks, tiles, splits, tables_per_split, token_blocks = plan(m, n, k, bits, tables, 132)
        blocks = row_blocks * splits * token_blocks
        fullest = -(-blocks // 132)
        work = fullest * tiles * tables_per_split * 132 / (-(-n // 16) * -(-k * tables[1] // 4096))
        assert blocks >= 0.8 * 132, (n, k, m)
        assert work < 1.35, (n, k, m, work)
        assert tiles * 16 >= 96, (n, k, m)


def test_the_largest_sizes_do_not_overflow(emulated: Emulated) -> None:
    limit = 1 << 24
    row_blocks, tiles, splits, tables_per_split, _ = plan(1, limit, 1, 8, (1, 4), 132)
    assert row_blocks * tiles * 16 >= limit
    row_blocks, tiles, splits, tables_per_split, _ = plan(1, 1, limit, 8, (8, 16), 132)
    assert splits * tables_per_split * 256 >= limit


@pytest.mark.parametrize(
    ("algorithm", "m", "accuracy", "wavefronts"),
    [
        ("lut_gemm", 1, "exact", 1),
        ("lut_gemm", 1, "near-exact", 1),
        ("biqgemm", 2, "exact", 2),
        ("biqgemm", 4, "exact", 4),
        ("biqgemm", 2, "accurate", 1),
        ("biqgemm", 4, "accurate", 2),
        ("biqgemm", 8, "accurate", 4),
    ],
)
def test_look_ups_and_builds_have_no_bank_conflicts(
    algorithm: str, m: int, accuracy: str, wavefronts: int, emulated: Emulated
) -> None:
    """The wavefronts that lut_tables.cuh derives: of a warp's look-up the given number, of tables 512 each."""
    case = OpCase(M=m, N=64, K=1024, bits=2, group_size=128, dtype="float16", accuracy=accuracy)
    x = case.inputs().x
    run(emulated, case, algorithm, x)  # makes the layout
    emulated.control.set(counts=1, sm_count=1)
    emulated.control.reset_counts()
    run(emulated, case, algorithm, x)
    sites = [site for site in emulated.control.report() if site["file"].startswith("lut")]
    emulated.control.set(counts=0)

    def total(names: tuple[str, ...], write: bool, key: str) -> int:
        chosen = [s for s in sites if s["write"] == write and s["space"] == "shared"]
        return sum(s[key] for s in chosen if any(name in s["function"] for name in names))

    look_ups = ("load_entry", "add_word")
    warps_look_ups = case.bits * case.N * case.K // 8 // 32
    assert total(look_ups, False, "accesses") == warps_look_ups
    assert total(look_ups, False, "cost") == warps_look_ups * wavefronts
    row_blocks, _, _, _, _ = plan(m, case.N, case.K, 2, (m, 4 * wavefronts), 1)
    assert total(("build",), True, "cost") == 512 * wavefronts * row_blocks
    shared = [s for s in sites if s["space"] == "shared"]
    assert sum(s["cost"] for s in shared) <= 1.1 * sum(s["ideal"] for s in shared)
    codes = [s for s in sites if s["space"] == "global" and s["bytes"] == 16]
    assert sum(s["cost"] for s in codes) == case.bits * case.N * case.K // 8 // 32, "sectors of codes, each read once"


@pytest.mark.parametrize("algorithm", ["lut_gemm", "biqgemm"])
@pytest.mark.parametrize("kind", ["free", "uniform"])
def test_tables_that_follow_each_other_in_a_block(algorithm: str, kind: str, emulated: Emulated) -> None:
    """One multiprocessor: one block takes all inputs, and its warps several tiles. Many: K is split."""
    for m, bits in ((1, 3), (5, 1)):
        case = OpCase(M=m, N=280, K=2600, bits=bits, scale_kind=kind, group_size=96)
        inputs = case.inputs("exact")
        truth = exact_result(inputs.x, inputs.weight).float()
        for sm_count in (1, 5, 132):
            emulated.control.set(sm_count=sm_count)
            assert_equal(run(emulated, case, algorithm, inputs.x, "exact"), truth, f"{case.name} {sm_count}")


BASE = OpCase(N=20, K=100, bits=2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"codes": torch.zeros(2, 1, 3, 511, dtype=torch.int32)}, "codes: got shape"),
        ({"codes": torch.zeros(2, 1, 9, 512, dtype=torch.int32)}, "bits=9"),
        ({"codes": torch.zeros(2, 1, 2, 512)}, "codes: has another dtype"),
        ({"scales": torch.zeros(2, 1, 5, 4, 4, 4)}, "scales: 5 terms for 2 planes"),
        ({"scales": torch.zeros(2, 1, 3, 4, 3, 4)}, "scales: unit 0 touches more than 3 groups"),
        ({"scales": torch.zeros(2, 1, 3, 4, 4, 4, dtype=torch.bfloat16)}, "scales: must be float16 or float32"),
        ({"uniform": True}, "scales: 3 terms for 2 planes"),
        ({"uniform": True, "scales": torch.zeros(2, 1, 2, 4, 4, 4)}, "scales: must be float16 in the uniform form"),
        ({"unit": torch.zeros(2)}, "scale_unit: got shape"),
        ({"N": 40}, "codes: got shape"),
        ({"group_size": 48}, "group_size=48: must be a multiple of 32"),
        ({"accuracy": 4}, "accuracy=4"),
        ({"x": torch.zeros(1, 2000)}, "codes: got shape"),
        ({"bias": torch.zeros(19)}, "bias: got shape"),
    ],
)
def test_the_raw_operators_check_their_arguments(changes: dict, text: str, emulated: Emulated) -> None:
    codes, scales, unit = layout(record(BASE))
    given = {"x": torch.zeros(1, 100), "codes": codes, "scales": scales, "unit": unit, "bias": None, "N": 20}
    given |= {"group_size": 32, "uniform": False, "accuracy": 3}
    for name in ("lut_gemm", "biqgemm"):
        operator = getattr(torch.ops.lutgemm_emulated, f"_bcq_{name}_cuda")
        assert operator(*given.values()).shape == (1, 20)
        with pytest.raises(RuntimeError, match=text):
            operator(*(given | changes).values())
