"""The CPU kernels: every instruction set of this machine, shapes around the kernels' blocks, threads, bad arguments."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lutgemm
from lutgemm.backends import Problem, cpu, heuristics
from lutgemm.errors import ArgumentError
from lutgemm.formats import BCQWeight
from lutgemm.formats.bcq import pack_bits
from lutgemm.testing.cases import OpCase
from lutgemm.testing.numerics import assert_equal, assert_within, error_bound, exact_result

pytestmark = pytest.mark.skipif(
    cpu.BACKEND.unavailable() is not None, reason=f"backend cpu: {cpu.BACKEND.unavailable()}"
)

ISAS = cpu.available_isas()
TABLES = ("lut_gemm", "biqgemm")
ALGORITHMS = (*TABLES, "dequantize")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

BLOCKS = [
    OpCase(M=m, N=n, K=k, bits=bits, group_size=g, scale_kind=kind, offsets=offsets, scale_dtype=scale)
    for m, n, k, bits, g, kind, offsets, scale in (
        (1, 1, 1, 1, 0, "free", True, "float16"),
        (2, 63, 31, 2, 0, "free", False, "float32"),
        (3, 65, 33, 3, 32, "uniform", False, "float16"),
        (8, 130, 100, 4, 64, "ratio", True, "bfloat16"),
        (17, 64, 257, 5, 128, "free", True, "bfloat16"),
        (4, 128, 256, 6, 0, "uniform", False, "float32"),
        (5, 70, 1056, 7, 1024, "free", True, "float32"),
        (9, 33, 300, 8, 32, "uniform", False, "bfloat16"),
        (7, 200, 640, 8, 96, "free", True, "float16"),
    )
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.use_isa(request.param):
        yield request.param


def run(x: Tensor, weight: BCQWeight, algorithm: str, bias: Tensor | None = None) -> Tensor:
    return lutgemm.bcq_linear(x, weight, bias, backend="cpu", algorithm=algorithm, accuracy="exact")


def record(weight: BCQWeight) -> tuple:
    """The arguments that describe a weight to the C++ operators."""
    t = weight.tensors
    kind = weight.scale_kind == "uniform"
    return t["codes"], t["scales"], t.get("offsets"), t.get("zeros"), weight.shape[1], weight.group_size, kind


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
def test_identity_activations_return_the_weight_bit_for_bit(case: OpCase, algorithm: str, isa: str):
    weight = case.weight()
    for dtype in DTYPES:
        y = run(torch.eye(case.K, dtype=dtype), weight, algorithm)
        assert_equal(y, weight.dequantize(dtype).T, f"{case.name} {dtype}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
def test_results_are_exact_or_within_their_bound(case: OpCase, algorithm: str, isa: str):
    for bias in (False, True):
        exact = replace(case, bias=bias).inputs("exact")
        truth = exact_result(exact.x, exact.weight, exact.bias).to(torch.float32)
        assert_equal(run(exact.x, exact.weight, algorithm, exact.bias), truth, case.name)
        for dtype in ("float32", "float16", "bfloat16"):
            i = replace(case, bias=bias, dtype=dtype).inputs()
            y = run(i.x, i.weight, algorithm, i.bias)
            bound = error_bound(i.x, i.weight, i.bias, algorithm)
            assert_within(y, exact_result(i.x, i.weight, i.bias), bound, f"{case.name} {dtype}")


@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
def test_bits_do_not_depend_on_the_algorithm_or_on_the_tokens_beside(case: OpCase, isa: str):
    i = replace(case, M=17, bias=True, dtype="float32").inputs()
    y = run(i.x, i.weight, "lut_gemm", i.bias)
    for m in (1, 2, 3, 4, 5, 8, 17):
        assert_equal(run(i.x[:m], i.weight, "biqgemm", i.bias), y[:m], f"{case.name}, {m} tokens")


@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
@pytest.mark.skipif("avx512" not in ISAS, reason="this CPU has no AVX-512")
def test_avx2_and_avx512_give_the_same_bits(case: OpCase):
    i = case.inputs()
    with cpu.use_isa("avx2"):
        narrow = run(i.x, i.weight, "lut_gemm")
    assert_equal(run(i.x, i.weight, "lut_gemm"), narrow, case.name)


@pytest.mark.parametrize("algorithm", TABLES)
@pytest.mark.parametrize("m", [1, 9])
def test_bits_do_not_depend_on_threads(algorithm: str, m: int, isa: str):
    """N is large enough for the work to be cut in two, and at one token for the prepared weight to have huge pages."""
    i = OpCase(M=m, N=6000 if m == 1 else 1100, K=1024, bits=3, group_size=128, bias=True).inputs()
    alone = run(i.x, i.weight, algorithm, i.bias)
    torch.set_num_threads(2)
    assert_equal(run(i.x, i.weight, algorithm, i.bias), alone)


def test_a_matrix_of_many_row_blocks(isa: str):
    """More rows than biqgemm keeps in cache at once, and y is compared in full."""
    i = OpCase(M=3, N=64 * 64 + 70, K=64, bits=2, group_size=32).inputs("exact")
    for algorithm in TABLES:
        assert_equal(run(i.x, i.weight, algorithm), exact_result(i.x, i.weight).float(), algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_tokens(algorithm: str, isa: str):
    i = OpCase(M=0, N=65, K=40, bias=True).inputs()
    assert run(i.x, i.weight, algorithm, i.bias).shape == (0, 65)


def test_scales_under_training_give_the_same_bits(isa: str):
    i = OpCase(M=2, N=65, K=100, bits=3).inputs()
    y = run(i.x, i.weight, "lut_gemm")
    for t in ("scales", "offsets"):
        i.weight.tensors[t].requires_grad_(True)
    trained = run(i.x, i.weight, "lut_gemm")
    assert_equal(trained, y)
    trained.sum().backward()
    assert i.weight.scales.grad.abs().sum() > 0


def test_panels_bound_the_memory_of_dequantize(monkeypatch: pytest.MonkeyPatch):
    i = OpCase(M=3, N=65, K=100, bits=3, bias=True).inputs("exact")
    whole = run(i.x, i.weight, "dequantize", i.bias)
    monkeypatch.setattr(cpu, "PANEL_BYTES", 7 * 4 * 100)
    assert_equal(run(i.x, i.weight, "dequantize", i.bias), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_agree_with_torch_on_every_value(dtype: torch.dtype, isa: str):
    """One-column weights whose only plane is +: W is the scale, widened or rounded by the kernels."""
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    codes = torch.ones(1, 1, 1, dtype=torch.int32)

    def convert(scales: Tensor, to: torch.dtype) -> Tensor:
        arguments = (codes.expand(1, len(scales), 1).contiguous(), scales.view(1, -1, 1), None, None, 1, 32, False)
        return torch.ops.lutgemm._bcq_dequantize_cpu(*arguments, 0, len(scales), to, cpu.ISAS.index(isa)).flatten()

    torch.testing.assert_close(convert(narrow, torch.float32), narrow.float(), rtol=0, atol=0, equal_nan=True)
    near = narrow.float().view(torch.int32)
    half = 1 << (12 if dtype == torch.float16 else 15)
    wide = torch.cat([near + step for step in (0, half - 1, half, half + 1)]).view(torch.float32)
    wide = torch.cat([wide, torch.tensor([65519.9, 65520.0, -7e4, 2.0**-25, 2.0**-24 * 0.75, 1e-45, 3.4e38])])
    found = convert(wide, dtype)
    torch.testing.assert_close(found, wide.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_and_results_of_every_dtype_convert_in_rows(dtype: torch.dtype, isa: str):
    """One plane, scale 1: y is a sum of x, converted in whole vectors and in the remainder."""
    codes = pack_bits(torch.ones(1, 77, 45, dtype=torch.uint8))
    weight = BCQWeight.build(codes, torch.ones(1, 77, 1), in_features=45, group_size=45)
    x = torch.randint(-3, 4, (2, 45)).to(dtype)
    assert_equal(run(x, weight, "lut_gemm"), x.sum(1, keepdim=True).expand(2, 77).contiguous())


def test_concurrent_calls_do_not_disturb_each_other():
    cases = [replace(case, M=3) for case in BLOCKS]
    inputs = [case.inputs("exact") for case in cases]
    expected = [exact_result(i.x, i.weight).float() for i in inputs]

    def many(k: int) -> bool:
        name = ISAS[k % len(ISAS)]
        with cpu.use_isa(name):
            assert cpu.isa() == name
            return all(torch.equal(run(i.x, i.weight, TABLES[k % 2]), y) for i, y in zip(inputs, expected, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(12)))


def test_compiled_code_gives_the_same_bits():
    i = OpCase(M=3, N=65, K=100, bits=3, bias=True).inputs()
    eager = lutgemm.bcq_linear(i.x, i.weight, i.bias, backend="cpu") * 2

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: Tensor, bias: Tensor) -> Tensor:
        return lutgemm.bcq_linear(x, i.weight, bias, backend="cpu") * 2

    assert_equal(compiled(i.x, i.bias), eager)


def test_use_isa_is_undone_and_refuses_what_is_absent():
    before = cpu.isa()
    with cpu.use_isa("scalar"):
        assert cpu.isa() == "scalar"
    assert cpu.isa() == before
    with pytest.raises(ArgumentError, match="'sse9' is not available"), cpu.use_isa("sse9"):
        pass


@pytest.mark.parametrize(
    ("value", "reason"),
    [("sse9", "'sse9' is unknown; use one of"), ("avx512", "but this CPU has"), ("", None), ("scalar", None)],
)
def test_the_environment_variable(value: str, reason: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, value)
    monkeypatch.setattr(cpu, "available_isas", lambda: ("scalar",))
    monkeypatch.setattr(cpu, "_best_isa", lambda: 0)
    cpu._environment_isa.cache_clear()
    try:
        found = cpu.BACKEND.unavailable()
        assert (found is None) if reason is None else (found is not None and reason in found)
    finally:
        cpu._environment_isa.cache_clear()


def test_choice_follows_the_table():
    problem = Problem("bcq_linear", "cpu", torch.float32, 1, 4096, 4096, 128, 4, "free")
    chosen = [heuristics.choose_on_cpu(problem._replace(M=m)) for m in (0, 1, 2, 64, 10**6)]
    assert chosen == ["lut_gemm", "lut_gemm", "biqgemm", "biqgemm", "dequantize"]
    assert heuristics.choose_on_cpu(problem._replace(M=64, dtype=torch.bfloat16)) == "dequantize"
    assert heuristics.choose_on_cpu(problem._replace(M=64, planes=8)) == "dequantize"
    books = Problem("codebook_linear", "cpu", torch.float32, 64, 4096, 4096, 128, 2, vec_len=4, codebook_bits=8)
    assert heuristics.choose_on_cpu(books) == "codegemm"
    assert heuristics.choose_on_cpu(books._replace(codebook_bits=12)) == "dequantize"


def test_every_row_of_the_table_can_be_taken():
    for row in heuristics.CPU_THRESHOLDS:
        assert row.algorithm in cpu.BACKEND.algorithms[row.op]
        assert 0 < row.max_tokens_bf16 <= row.max_tokens
        assert row.device
        assert row.date


PACKED = OpCase(N=70, K=100, bits=3, group_size=64).weight()


def damaged(offset: int, values: list[int], as_bytes: bool) -> Tensor:
    packed = torch.ops.lutgemm._bcq_pack_cpu(*record(PACKED), as_bytes)
    packed[offset : offset + len(values)] = torch.tensor(values, dtype=torch.uint8)
    return packed


LAYOUTS = [False] + [True] * ("avx512vbmi" in ISAS)
BEST = {False: (0, 3), True: (3, 1)}
"""isa and accuracy that read a layout, of words or of bytes."""


@pytest.mark.parametrize("as_bytes", LAYOUTS)
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: torch.zeros(10, dtype=torch.uint8), "too short"),
        (lambda p: torch.zeros(4096, dtype=torch.uint8), "does not start"),
        (lambda p: torch.randint(0, 256, (4096,), dtype=torch.uint8), "does not start"),
        (lambda p: p(8, [0] * 8), "impossible N or K"),
        (lambda p: p(8, [255] * 8), "impossible N or K"),
        (lambda p: p(19, [2]), "impossible N or K"),
        (lambda p: p(24, [63]), "impossible group size"),
        (lambda p: p(24, [0] * 8), "impossible group size"),
        (lambda p: p(32, [0]), "number of bits"),
        (lambda p: p(32, [9]), "number of bits"),
        (lambda p: p(36, [2]), "unknown kind"),
        (lambda p: p(36, [1]), "unknown kind"),
        (lambda p: p(44, [3]), "unknown scale dtype"),
        (lambda p: p(32, [8]), "its size"),
        (lambda p: p(8, [200]), "its size"),
        (lambda p: p(0, [])[:-1], "its size"),
        (lambda p: p(0, [])[:40], "too short"),
        (lambda p: p(8, [71]), "it holds N=71"),
        (lambda p: p(0, []).view(1, -1), "packed: got shape"),
        (lambda p: p(0, []).to(torch.int32), "packed: must be uint8"),
        (lambda p: p(0, []).repeat_interleave(2)[::2], "packed: must be contiguous"),
    ],
)
def test_a_wrong_packed_weight_is_refused(change, text: str, as_bytes: bool):
    packed = change(lambda offset, values: damaged(offset, values, as_bytes))
    with pytest.raises(RuntimeError, match=text):
        torch.ops.lutgemm._bcq_linear_cpu(torch.zeros(2, 100), packed, None, 70, True, *BEST[as_bytes])


@pytest.mark.skipif("avx512vbmi" not in ISAS, reason="this CPU has no AVX-512 VBMI")
@pytest.mark.parametrize(("choice", "text"), [((2, 1), "isa=3"), ((3, 3), "integer tables")])
def test_the_layout_of_bytes_is_for_its_kernels_only(choice: tuple[int, int], text: str):
    packed = damaged(0, [], as_bytes=True)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.lutgemm._bcq_linear_cpu(torch.zeros(2, 100), packed, None, 70, True, *choice)


@pytest.mark.skipif("avx512vbmi" not in ISAS, reason="this CPU has no AVX-512 VBMI")
def test_the_layout_of_bytes_checks_the_dtype_of_zeros():
    packed = damaged(48, [9], as_bytes=True)
    with pytest.raises(RuntimeError, match="unknown dtype of zeros"):
        torch.ops.lutgemm._bcq_linear_cpu(torch.zeros(2, 100), packed, None, 70, True, 3, 1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"x": torch.zeros(2, 99)}, r"x: got shape \[2, 99\], its last dimension must be K=100"),
        ({"x": torch.zeros(())}, "x: got shape"),
        ({"x": torch.zeros(100, 2).T}, "x: must be contiguous"),
        ({"x": torch.zeros(2, 100, dtype=torch.float64)}, "x: must be float32, float16 or bfloat16"),
        ({"bias": torch.zeros(71)}, "bias: got shape"),
        ({"bias": torch.zeros(70, dtype=torch.float16)}, "bias: must have the dtype of x"),
        ({"N": 64}, "packed: it holds N=70"),
        ({"isa": 4}, "isa=4: must be from 0 to 3"),
        ({"accuracy": 4}, "accuracy=4: must be from 0 to 3"),
        ({"isa": -1}, "isa=-1"),
    ],
)
def test_the_raw_operator_checks_its_arguments(changes: dict, text: str):
    packed = torch.ops.lutgemm._bcq_pack_cpu(*record(PACKED), False)
    arguments = {"x": torch.zeros(2, 100), "packed": packed, "bias": None, "N": 70, "biqgemm": False}
    arguments |= {"isa": 0, "accuracy": 3}
    assert torch.ops.lutgemm._bcq_linear_cpu(**arguments).shape == (2, 70)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.lutgemm._bcq_linear_cpu(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"codes": torch.zeros(3, 70, 3, dtype=torch.int32)}, "codes: got shape"),
        ({"codes": torch.zeros(9, 70, 4, dtype=torch.int32)}, "bits=9"),
        ({"codes": torch.zeros(0, 70, 4, dtype=torch.int32)}, "bits=0"),
        ({"codes": torch.zeros(3, 0, 4, dtype=torch.int32)}, "N=0"),
        ({"codes": torch.zeros(3, 70, 4)}, "codes: must be int32"),
        ({"codes": torch.zeros(3, 4, 70, dtype=torch.int32).mT}, "codes: must be contiguous"),
        ({"scales": torch.zeros(2, 70, 2)}, "scales: got shape"),
        ({"scales": torch.zeros(3, 70, 2, dtype=torch.int32)}, "scales: must be float32"),
        ({"offsets": torch.zeros(70, 3, dtype=torch.float16)}, "offsets: got shape"),
        ({"offsets": torch.zeros(70, 2)}, "offsets: must have the dtype of scales"),
        ({"zeros": torch.zeros(70, 2)}, "zeros: the uniform kind needs them"),
        ({"uniform": True}, "scales: got shape"),
        ({"K": 0}, "K=0: must be from 1"),
        ({"K": 2**40}, "K=1099511627776"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": 40}, "group_size=40: must be a multiple of 32"),
    ],
)
def test_packing_checks_its_arguments(changes: dict, text: str):
    names = ("codes", "scales", "offsets", "zeros", "K", "group_size", "uniform")
    arguments = dict(zip(names, record(PACKED), strict=True)) | {"bytes": False}
    with pytest.raises(RuntimeError, match=text):
        torch.ops.lutgemm._bcq_pack_cpu(**(arguments | changes))


@pytest.mark.parametrize(
    ("rows", "dtype", "text"),
    [
        ((-1, 3), torch.float32, "row_begin=-1"),
        ((3, 2), torch.float32, "row_end=2: must be from 3 to 70"),
        ((0, 71), torch.float32, "row_end=71"),
        ((0, 70), torch.float64, "dtype: must be float32"),
    ],
)
def test_dequantizing_checks_its_arguments(rows: tuple[int, int], dtype: torch.dtype, text: str):
    with pytest.raises(RuntimeError, match=text):
        torch.ops.lutgemm._bcq_dequantize_cpu(*record(PACKED), *rows, dtype, 0)


def test_dequantizing_some_rows(isa: str):
    for case in BLOCKS:
        if case.scale_kind != "ratio":
            weight, rows = case.weight(), slice(case.N // 3, case.N - case.N // 4)
            number = cpu.ISAS.index(isa)
            w = torch.ops.lutgemm._bcq_dequantize_cpu(*record(weight), rows.start, rows.stop, torch.float16, number)
            assert_equal(w, weight.dequantize(torch.float16, rows), case.name)
