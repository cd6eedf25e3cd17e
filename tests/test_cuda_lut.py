"""LUT-GEMM and BiQGEMM of csrc/cuda: their layout, how they cut a problem, bank conflicts, tables in a row.

What they compute is checked by test_cuda_emulated.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Plan:
    """How a kernel cuts a problem, as `_lut_plan` says it."""

    row_blocks: int
    strips: int
    splits: int
    tables_per_split: int
    token_blocks: int
    resident: int
    """blocks that a multiprocessor holds at once"""
    tokens: int
    inputs: int
    """of a table"""
    strip_rows: int
    shared: int
    """bytes of a block"""


H100 = 227 * 1024
A100 = 163 * 1024
ADA = 99 * 1024
"""Most shared memory of a block; a multiprocessor has 1 KB more, and keeps 1 KB for each block."""
RESERVED = 1024

EXACT, ACCURATE = resolve_accuracy("exact"), resolve_accuracy("accurate")


def plan(m: int, n: int, k: int, bits: int, accuracy: int = ACCURATE, sm_count: int = 132, shared: int = H100) -> Plan:
    """Of `lut_gemm` for one token, else of `biqgemm`."""
    made = torch.ops.lutgemm_emulated._lut_plan(torch.empty(m, k), n, bits, m > 1, accuracy, sm_count, shared)
    return Plan(*made.tolist())


SIZES = list(product((1, 2, 4, 7, 13, 40), (1, 100, 4096, 28672), (1, 1024, 14336), (1, 4), (1, 132)))


@pytest.mark.parametrize("accuracy", [EXACT, ACCURATE])
@pytest.mark.parametrize("shared", [H100, A100, ADA])
def test_a_cut_covers_the_problem_and_fits(accuracy: int, shared: int, emulated: Emulated) -> None:
    for m, n, k, bits, sm_count in SIZES:
        p = plan(m, n, k, bits, accuracy, sm_count, shared)
        all_strips, all_tables = -(-n // p.strip_rows), -(-k // p.inputs)
        assert (p.row_blocks - 1) * p.strips < all_strips <= p.row_blocks * p.strips
        assert (p.splits - 1) * p.tables_per_split < all_tables <= p.splits * p.tables_per_split
        assert p.token_blocks == -(-m // p.tokens)
        assert p.row_blocks <= 65535, "of a grid"
        assert p.splits <= 1024
        assert p.shared <= shared, "of a block"
        assert p.resident >= 1
        assert p.resident * (p.shared + RESERVED) <= shared + RESERVED, "of a multiprocessor"


def test_a_cut_is_for_the_blocks_that_a_multiprocessor_holds(emulated: Emulated) -> None:
    """Of 8 warps and 64 KB of tables: two where there are 228 KB, one where there are 100."""
    for m, accuracy, bits in product((8, 16), (EXACT, ACCURATE), (2, 4)):
        assert plan(m, 8192, 8192, bits, accuracy, shared=H100).resident == 2
        assert plan(m, 8192, 8192, bits, accuracy, shared=ADA).resident == 1
    for m, shared in product((1, 2, 4), (H100, A100, ADA)):
        assert plan(m, 28672, 4096, 2, shared=shared).resident == 1, "16 warps take all registers"


def test_too_little_shared_memory_is_an_error(emulated: Emulated) -> None:
    with pytest.raises(RuntimeError, match="bytes of shared memory, and the device has 65536"):
        plan(8, 4096, 4096, 2, shared=64 * 1024)


def test_layers_of_models_fill_a_gpu(emulated: Emulated) -> None:
    """At least one block for nearly each multiprocessor, even ones, and enough rows to be worth a table."""
    for (n, k), m, bits, shared in product(
        ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (8192, 28672)),
        (1, 4, 8, 16),
        (1, 2, 4),
        (H100, ADA),
    ):
        p = plan(m, n, k, bits, shared=shared)
        blocks = p.row_blocks * p.splits * p.token_blocks
        fullest = -(-blocks // 132)
        work = fullest * p.strips * p.strip_rows * p.tables_per_split * p.inputs * 132 / (n * k)
        assert blocks >= 0.8 * 132, (n, k, m)
        assert work < 1.35, (n, k, m, work)
        assert p.strips * p.strip_rows >= 96, (n, k, m)


def test_the_largest_sizes_do_not_overflow(emulated: Emulated) -> None:
    limit = 1 << 24
    p = plan(1, limit, 1, 8)
    assert p.row_blocks * p.strips * p.strip_rows >= limit
    for m, accuracy in ((8, ACCURATE), (16, EXACT)):
        p = plan(m, 1, limit, 8, accuracy)
        assert p.splits * p.tables_per_split * p.inputs >= limit


@pytest.mark.parametrize(
    ("m", "accuracy", "tokens"),
    [(m, EXACT, tokens) for m, tokens in ((2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (16, 16), (24, 8), (32, 16))]
    + [(m, ACCURATE, tokens) for m, tokens in ((2, 2), (4, 4), (7, 8), (9, 16), (16, 16), (17, 8), (25, 16))],
)
def test_up_to_16_tokens_share_a_table(m: int, accuracy: int, tokens: int, emulated: Emulated) -> None:
    assert plan(m, 4096, 4096, 2, accuracy).tokens == tokens


def sites_of(built: Emulated, case: OpCase, algorithm: str, sm_count: int = 1) -> list[dict]:
    """What the emulator counts in a call; the layout is there already."""
    x = case.inputs().x
    run(built, case, algorithm, x)
    built.control.set(counts=1, sm_count=sm_count)
    built.control.reset_counts()
    run(built, case, algorithm, x)
    built.control.set(counts=0)
    return [site for site in built.control.report() if site["file"].startswith("lut")]


def code_bytes(sites: list[dict]) -> int:
    """That were read of packed codes, in sectors of 32 bytes."""
    return 32 * sum(s["cost"] for s in sites if s["space"] == "global" and "RowCodes" in s["function"])


@pytest.mark.parametrize(
    ("algorithm", "m", "accuracy", "wavefronts"),
    [
        ("lut_gemm", 1, "exact", 1),
        ("lut_gemm", 1, "near-exact", 1),
        ("biqgemm", 2, "exact", 2),
        ("biqgemm", 4, "exact", 4),
        ("biqgemm", 8, "exact", 8),
        ("biqgemm", 16, "exact", 16),
        ("biqgemm", 2, "accurate", 1),
        ("biqgemm", 4, "accurate", 2),
        ("biqgemm", 8, "accurate", 4),
        ("biqgemm", 16, "accurate", 8),
    ],
)
def test_look_ups_and_builds_have_no_bank_conflicts(
    algorithm: str, m: int, accuracy: str, wavefronts: int, emulated: Emulated
) -> None:
    """The wavefronts that lut_tables.cuh derives: of a warp's look-up the given number, of tables 512 each."""
    case = OpCase(M=m, N=64, K=1024, bits=2, group_size=128, dtype="float16", accuracy=accuracy)
    sites = sites_of(emulated, case, algorithm)

    def total(names: tuple[str, ...], write: bool, key: str) -> int:
        chosen = [s for s in sites if s["write"] == write and s["space"] == "shared"]
        return sum(s[key] for s in chosen if any(name in s["function"] for name in names))

    look_ups = ("load_entry", "add_word")
    warps_look_ups = case.bits * case.N * case.K // 8 // 32
    loads = max(1, wavefronts // 4)
    assert total(look_ups, False, "accesses") == warps_look_ups * loads
    assert total(look_ups, False, "cost") == warps_look_ups * wavefronts
    row_blocks = plan(m, case.N, case.K, 2, resolve_accuracy(accuracy), 1).row_blocks
    assert total(("build",), True, "cost") == 512 * wavefronts * row_blocks
    shared = [s for s in sites if s["space"] == "shared"]
    assert sum(s["cost"] for s in shared) <= 1.05 * sum(s["ideal"] for s in shared)


@pytest.mark.parametrize("accuracy", ["exact", "accurate"])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 16])
def test_one_pass_over_the_codes(m: int, accuracy: str, emulated: Emulated) -> None:
    """Up to 16 tokens, the bytes of codes that are read are those of the codes, padded to strips of rows and tables of
    inputs; more tokens read them again."""
    algorithm = "lut_gemm" if m == 1 else "biqgemm"
    for n, k, sm_count in ((72, 600, 1), (72, 1100, 132)):
        case = OpCase(M=m, N=n, K=k, bits=3, group_size=96, dtype="float16", accuracy=accuracy)
        p = plan(m, n, k, case.bits, resolve_accuracy(accuracy), sm_count)
        rows, inputs = -(-n // p.strip_rows) * p.strip_rows, -(-k // p.inputs) * p.inputs
        assert code_bytes(sites_of(emulated, case, algorithm, sm_count)) == case.bits * rows * inputs // 8
    if m == 16:
        twice = OpCase(M=32, N=64, K=1024, bits=1, dtype="float16", accuracy=accuracy)
        assert code_bytes(sites_of(emulated, twice, algorithm)) == 2 * twice.N * twice.K // 8


@pytest.mark.parametrize("algorithm", ["lut_gemm", "biqgemm"])
@pytest.mark.parametrize("kind", ["free", "uniform"])
def test_tables_that_follow_each_other_in_a_block(algorithm: str, kind: str, emulated: Emulated) -> None:
    """One multiprocessor: one block takes all inputs, and its warps several strips. Many: K is split."""
    for m, bits in ((1, 3), (5, 1)):
        case = OpCase(M=m, N=280, K=2600, bits=bits, scale_kind=kind, group_size=96)
        inputs = case.inputs("exact")
        truth = exact_result(inputs.x, inputs.weight).float()
        for sm_count in (1, 5, 132):
            emulated.control.set(sm_count=sm_count)
            assert_equal(run(emulated, case, algorithm, inputs.x, "exact"), truth, f"{case.name} {sm_count}")


@pytest.mark.parametrize("accuracy", ["exact", "accurate"])
@pytest.mark.parametrize(
    ("kind", "scale_dtype"),
    [("free", "float16"), ("free", "float32"), ("ratio", "float32"), ("uniform", "float16"), ("uniform", "float32")],
)
def test_sixteen_tokens_with_scales_of_every_kind(
    kind: str, scale_dtype: str, accuracy: str, emulated: Emulated
) -> None:
    """Their kernels learn the kind of scales at run time."""
    for m, offsets in ((6, True), (16, True), (11, False)):
        case = OpCase(
            M=m, N=88, K=700, bits=2, scale_kind=kind, scale_dtype=scale_dtype, group_size=64, offsets=offsets
        )
        case = replace(case, accuracy=accuracy)
        inputs = case.inputs("exact")
        truth = exact_result(inputs.x, inputs.weight).float()
        for sm_count in (1, 132):
            emulated.control.set(sm_count=sm_count)
            assert_equal(run(emulated, case, "biqgemm", inputs.x, "exact"), truth, f"{case.name} {sm_count}")


def test_a_large_word_leaves_the_tokens_other_words_their_digits(emulated: Emulated) -> None:
    """fp16 tables of 16 tokens have one unit for 128 inputs of a token: rounding stays relative to each entry."""
    case = OpCase(M=16, N=32, K=128, bits=2, group_size=32, dtype="float32", accuracy="accurate")
    r = record(case)
    scales, offsets = r.scales.clone(), r.offsets.clone()
    scales[:, :, 0], offsets[:, 0] = 0, 0
    x = case.inputs().x.clone()
    dense = case.weight().dequantize(torch.float64)
    truth = x[:, 32:].double() @ dense[:, 32:].T
    for outlier in (1, 2.0**8, 2.0**14):
        x[:, :32] = outlier
        y = emulated.backend.bcq_linear(
            x, r.codes, scales, offsets, None, None, None, r.group_size, r.scale_kind, "biqgemm", ACCURATE
        )
        assert (y - truth).abs().max() < 2.0**-9 * truth.abs().max(), outlier


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
