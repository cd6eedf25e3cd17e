"""The CPU codebook operators, called directly: each instruction set of this machine against the format's arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from lutgemm import _native
from lutgemm.formats import CodebookWeight

REASON = _native.load_ops("_C")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

ISA_NAMES = ("scalar", "avx2", "avx512", "avx512vbmi")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOKENS = (0, 1, 2, 3, 8, 17)
VBMI, EXACT = 3, 3
ACCURACY_NAMES = ("fast", "accurate", "near-exact", "exact")
KERNELS = ((0, EXACT), (1, EXACT), (2, EXACT), (VBMI, 0), (VBMI, 1), (VBMI, 2), (VBMI, EXACT))
TABLE_BITS = {0: 8, 1: 14, 2: 16}
RELATIVE_ERROR = {0: 2e-2, 1: 1e-3, 2: 1e-4, EXACT: 1e-6}
TILE_ENTRIES = 32


@dataclass(frozen=True)
class Case:
    """Shape and kind of one weight."""

    num_codebooks: int
    vec_len: int
    bits: int
    n: int
    k: int
    group_size: int
    scale_dtype: torch.dtype = torch.float16

    def __str__(self) -> str:
        kind = f"m{self.num_codebooks}v{self.vec_len}b{self.bits}"
        return f"{kind}-{self.n}x{self.k}-g{self.group_size}-{str(self.scale_dtype).removeprefix('torch.')}"


CASES = (
    Case(1, 4, 8, 130, 256, 128),
    Case(2, 8, 8, 257, 256, 128, torch.bfloat16),
    Case(1, 8, 8, 128, 264, 264),
    Case(4, 16, 8, 67, 333, 48),
    Case(1, 2, 5, 70, 101, 6, torch.float32),
    Case(3, 4, 7, 33, 100, 20),
    Case(2, 4, 6, 129, 96, 96),
    Case(3, 8, 8, 200, 1000, 1000),
    Case(1, 16, 1, 1, 1, 1),
    Case(2, 2, 2, 3, 7, 7),
    Case(1, 8, 10, 150, 203, 64),
    Case(3, 4, 9, 65, 77, 28, torch.bfloat16),
    Case(1, 2, 12, 40, 66, 1000, torch.float32),
    Case(2, 16, 11, 20, 160, 32),
)


@cache
def runs_here(isa: int) -> bool:
    try:
        dequantize(make_weight(CASES[8]), isa)
    except RuntimeError:
        return False
    return True


@pytest.fixture(params=range(4), ids=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> int:
    if not runs_here(request.param):
        pytest.skip(f"this CPU has no {ISA_NAMES[request.param]}")
    return request.param


@pytest.fixture(params=KERNELS, ids=lambda k: f"{ISA_NAMES[k[0]]}-{ACCURACY_NAMES[k[1]]}")
def kernel(request: pytest.FixtureRequest) -> tuple[int, int]:
    """(instruction set, accuracy) where that is a kernel of its own: all others are exact."""
    if not runs_here(request.param[0]):
        pytest.skip(f"this CPU has no {ISA_NAMES[request.param[0]]}")
    return request.param


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def make_weight(case: Case, exact: bool = False) -> CodebookWeight:
    """Random codes. `exact`: centroids are integers of -4..4 and scales 1/2, 1 or 2; otherwise both are normal."""
    gen = torch.Generator().manual_seed(case.n * case.k)
    code_dtype = torch.uint8 if case.bits <= 8 else torch.int16
    codes = torch.randint(
        2**case.bits, (case.num_codebooks, case.n, -(-case.k // case.vec_len)), generator=gen, dtype=code_dtype
    )
    codebook_shape = (case.num_codebooks, 2**case.bits, case.vec_len)
    scale_shape = (case.n, -(-case.k // case.group_size))
    if exact:
        codebooks = torch.randint(-4, 5, codebook_shape, generator=gen)
        scales = torch.tensor([0.5, 1.0, 2.0])[torch.randint(3, scale_shape, generator=gen)]
    else:
        codebooks = torch.randn(codebook_shape, generator=gen)
        scales = torch.randn(scale_shape, generator=gen)
    return CodebookWeight.build(
        codes,
        codebooks.to(case.scale_dtype),
        scales.to(case.scale_dtype),
        in_features=case.k,
        group_size=case.group_size,
    )


def pack(w: CodebookWeight) -> Tensor:
    return torch.ops.lutgemm._codebook_pack_cpu(w.codes, w.codebooks, w.scales, w.shape[1], w.group_size)


def linear(
    x: Tensor,
    w: CodebookWeight,
    isa: int,
    bias: Tensor | None = None,
    packed: Tensor | None = None,
    accuracy: int = EXACT,
) -> Tensor:
    packed = pack(w) if packed is None else packed
    return torch.ops.lutgemm._codebook_linear_cpu(
        x, w.codes, w.codebooks, w.scales, bias, packed, w.group_size, isa, accuracy
    )


def dequantize(
    w: CodebookWeight, isa: int, dtype: torch.dtype = torch.float32, rows: tuple[int, int] | None = None
) -> Tensor:
    begin, end = rows or (0, w.shape[0])
    return torch.ops.lutgemm._codebook_dequantize_cpu(
        w.codes, w.codebooks, w.scales, w.shape[1], w.group_size, begin, end, dtype, isa
    )


def with_tensors(w: CodebookWeight, codebooks: Tensor, scales: Tensor) -> CodebookWeight:
    return CodebookWeight.build(w.codes, codebooks, scales, in_features=w.shape[1], group_size=w.group_size)


def exact_weight(w: CodebookWeight) -> Tensor:
    """W `[N, K]` in fp64 from the stored values, nothing rounded to fp32 on the way."""
    value = sum(w.codebooks[c].double()[w.codes[c].long()] for c in range(len(w.codes)))
    scales = w.scales.double().repeat_interleave(w.group_size, 1)[:, : w.shape[1]]
    return value.flatten(-2)[:, : w.shape[1]] * scales


def error_bound(x: Tensor, w: CodebookWeight, bias: Tensor | None = None) -> Tensor:
    """`[M, N]`: largest error of y before it is rounded to x's dtype, for fp32 sums in the order of the kernels.

    y is a sum of the terms x[k] * codebooks[c, i, d] * scales[g]. A term goes through at most vec_len roundings in its
    Psumbook entry, one for each entry of its group, one for its scale, one for each group, and one for the bias: n in
    all. Each multiplies it by (1 + d) with |d| <= u = 2^-24, so the sum is off by at most n*u / (1 - n*u) times the sum
    of the terms' absolute values.
    """
    layout = w.layout
    group_entries = min(-(-layout.group_size // layout.vec_len), layout.num_vectors) * layout.num_codebooks
    n = layout.vec_len + group_entries + 1 + layout.num_groups + 1
    unit = 2.0**-24
    absolute = exact_weight(with_tensors(w, w.codebooks.abs(), w.scales.abs()))
    terms = x.double().abs() @ absolute.T
    if bias is not None:
        terms = terms + bias.double().abs()
    return terms * (n * unit / (1 - n * unit))


def fixed_point_error(x: Tensor, w: CodebookWeight, accuracy: int) -> Tensor:
    """`[M, N]`: largest error of y from tables of fixed point, before the fp32 arithmetic around them.

    Of 32 entries (vectors times codebooks) in order within a group, let B be the largest norm of a vector of x times
    the largest norm of a centroid. A table entry of b bits is off by at most half a step, 2^-b * B. Where x and
    centroids become int16 first, centroid components are off by at most u/2, u <= |c| / 32767, which a vector of x
    carries to at most sqrt(v) * 2^-16 * B; and x by at most what is v * 2^-16 * B after the product. Where they stay
    fp32 there are v roundings of 2^-23 * B. 1 % on top is for the room that the kernel keeps below its limits.
    """
    layout, bits = w.layout, TABLE_BITS[accuracy]
    v, books = layout.vec_len, layout.num_codebooks
    group_vectors = min(-(-layout.group_size // v), layout.num_vectors)
    padded = torch.nn.functional.pad(x.double(), (0, layout.num_vectors * v - x.shape[1]))
    norms = padded.unflatten(1, (-1, v)).norm(dim=2)
    largest_centroid = w.codebooks.double().norm(dim=2).max()
    factors = 2.0**-16 * (v + v**0.5) if bits < 16 else v * 2.0**-23
    error = torch.zeros(x.shape[0], layout.out_features, dtype=torch.float64)
    for group in range(layout.num_groups):
        vectors = range(group * group_vectors, min((group + 1) * group_vectors, layout.num_vectors))
        entries = [j for j in vectors for _ in range(books)]
        for start in range(0, len(entries), TILE_ENTRIES):
            tile = entries[start : start + TILE_ENTRIES]
            bound = norms[:, tile].amax(1) * largest_centroid
            each = bound * (2.0**-bits + factors) * 1.01
            error += (len(tile) * each)[:, None] * w.scales[:, group].double().abs()
    return error


def check_close(y: Tensor, exact: Tensor, bound: Tensor) -> None:
    """|y - exact| <= bound, plus half a unit in the last place of y's dtype."""
    info = torch.finfo(y.dtype)
    allowed = bound + (exact.abs() + bound) * (info.eps / 2) + info.smallest_normal * info.eps / 2
    excess = (y.double() - exact).abs() - allowed
    worst = int(excess.argmax())
    m, n = divmod(worst, y.shape[1])
    assert excess.flatten()[worst] <= 0, f"y[{m}, {n}] = {y[m, n]}, expected {exact[m, n]} +- {allowed[m, n]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_activations_return_the_weight(case: Case, dtype: torch.dtype, isa: int) -> None:
    weight = make_weight(case)
    y = linear(torch.eye(case.k, dtype=dtype), weight, isa)
    assert torch.equal(y.T, weight.dequantize(dtype))


def test_small_integers_are_exact(case: Case, isa: int) -> None:
    weight = make_weight(case, exact=True)
    packed, dense = pack(weight), exact_weight(weight)
    gen = torch.Generator().manual_seed(0)
    for tokens in TOKENS:
        x = torch.randint(-8, 9, (tokens, case.k), generator=gen).float()
        bias = torch.randint(-8, 9, (case.n,), generator=gen).float()
        expected = x.double() @ dense.T
        assert torch.equal(linear(x, weight, isa, packed=packed).double(), expected)
        assert torch.equal(linear(x, weight, isa, bias, packed).double(), expected + bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_activations_stay_within_the_bound(case: Case, dtype: torch.dtype, isa: int) -> None:
    weight = make_weight(case)
    packed, dense = pack(weight), exact_weight(weight)
    gen = torch.Generator().manual_seed(1)
    for tokens in (1, 3, 7, 17):
        x = torch.randn(tokens, case.k, generator=gen)
        x[:, :: max(1, case.k // 3)] *= 100  # outliers
        x, bias = x.to(dtype), torch.randn(case.n, generator=gen).to(dtype)
        exact = x.double() @ dense.T + bias.double()
        check_close(linear(x, weight, isa, bias, packed), exact, error_bound(x, weight, bias))


def test_bias_is_added_before_the_only_rounding(isa: int) -> None:
    case = Case(1, 4, 8, 64, 256, 64)
    weight = make_weight(case, exact=True)
    x = torch.randint(-200, 201, (3, case.k), generator=torch.Generator().manual_seed(1)).half()
    bias = torch.full((case.n,), 0.75).half()
    without_bias = x.double() @ exact_weight(weight).T
    expected = (without_bias + 0.75).half()
    assert not torch.equal(expected, without_bias.half() + bias)  # rounding twice would show
    assert torch.equal(linear(x, weight, isa, bias), expected)


def test_a_token_does_not_depend_on_its_neighbours(case: Case, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    weight = make_weight(case)
    packed = pack(weight)
    x = torch.randn(23, case.k, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([linear(row[None], weight, isa, None, packed, accuracy) for row in x])
    for tokens in (2, 4, 7, 11, 23):
        assert torch.equal(linear(x[:tokens], weight, isa, None, packed, accuracy), alone[:tokens])


@pytest.mark.parametrize("tokens", [1, 17])
def test_bits_do_not_depend_on_threads_or_runs(case: Case, tokens: int, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    weight = make_weight(case)
    x = torch.randn(tokens, case.k, generator=torch.Generator().manual_seed(3))
    results, packs, rows = [], [], []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        packs.append(pack(weight))
        results.append(linear(x, weight, isa, None, packs[0], accuracy))
        rows.append(dequantize(weight, isa))
    assert all(torch.equal(y, results[0]) for y in results)
    assert all(torch.equal(p, packs[0]) for p in packs)
    assert all(torch.equal(r, rows[0]) for r in rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_accuracy_stays_within_its_bound(case: Case, dtype: torch.dtype, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    exact = accuracy == EXACT or case.bits > 8
    weight = make_weight(case)
    packed, dense = pack(weight), exact_weight(weight)
    gen = torch.Generator().manual_seed(5)
    for tokens in (1, 2, 3, 7, 17):
        x = torch.randn(tokens, case.k, generator=gen)
        x[:, :: max(1, case.k // 3)] *= 100  # outliers
        if tokens == 7:
            x[:] = torch.eye(7, case.k)
        x, bias = x.to(dtype), torch.randn(case.n, generator=gen).to(dtype)
        bound = error_bound(x, weight, bias)
        if not exact:
            bound += fixed_point_error(x, weight, accuracy)
        check_close(linear(x, weight, isa, bias, packed, accuracy), x.double() @ dense.T + bias.double(), bound)


@pytest.mark.parametrize("outliers", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("vec_len", [2, 4, 8, 16])
@pytest.mark.parametrize("num_codebooks", [1, 2, 4])
def test_relative_errors(num_codebooks: int, vec_len: int, outliers: float, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    w = make_weight(Case(num_codebooks, vec_len, 8, 130, 1024, 128))
    smaller = w.codebooks * 0.4 ** torch.arange(num_codebooks)[:, None, None]  # as residuals have them
    w = with_tensors(w, smaller.to(w.codebooks.dtype), w.scales)
    gen = torch.Generator().manual_seed(6)
    x = torch.randn(4, 1024, generator=gen)
    x[:, torch.randperm(1024, generator=gen)[:20]] *= outliers
    exact = x.double() @ exact_weight(w).T
    error = (linear(x, w, isa, None, None, accuracy).double() - exact).norm() / exact.norm()
    assert error <= RELATIVE_ERROR[accuracy]


@pytest.mark.parametrize("power", [-80, 60])
def test_powers_of_two_pass_through(power: int, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    weight = make_weight(Case(2, 4, 8, 130, 256, 64))
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(7))
    scaled = linear(x * 2.0**power, weight, isa, None, None, accuracy)
    assert torch.equal(scaled, linear(x, weight, isa, None, None, accuracy) * 2.0**power)


def test_zeros_give_the_bias(case: Case, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    weight = make_weight(case)
    bias = torch.randn(case.n)
    for tokens in (1, 5):
        y = linear(torch.zeros(tokens, case.k), weight, isa, bias, None, accuracy)
        assert torch.equal(y, bias.expand(tokens, -1))
    nothing = with_tensors(weight, torch.zeros_like(weight.codebooks), weight.scales)
    assert torch.equal(linear(torch.ones(1, case.k), nothing, isa, bias, None, accuracy), bias[None])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(value: float, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    weight = make_weight(Case(2, 4, 8, 70, 100, 20))
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(8))
    expected = linear(x, weight, isa, None, None, accuracy)
    x[1, 33] = value
    y = linear(x, weight, isa, None, None, accuracy)
    assert not y[1].isfinite().any()
    assert torch.equal(y[::2], expected[::2])
    codebooks = weight.codebooks.clone()
    codebooks[1, :, 2] = value
    y = linear(x[:1], with_tensors(weight, codebooks, weight.scales), isa, None, None, accuracy)
    assert not y.isfinite().any()


@pytest.mark.parametrize("case", [case for case in CASES if case.bits > 8], ids=str)
def test_on_no_instruction_set_have_wide_codes_kernels_of_integers(case: Case, isa: int) -> None:
    check_that_every_accuracy_is_exact(case, isa)


@pytest.mark.parametrize("isa", [level for level in range(4) if REASON is None and level != VBMI and runs_here(level)])
def test_without_a_kernel_of_its_own_an_accuracy_is_exact(case: Case, isa: int) -> None:
    check_that_every_accuracy_is_exact(case, isa)


def check_that_every_accuracy_is_exact(case: Case, isa: int) -> None:
    weight = make_weight(case)
    x = torch.randn(3, case.k, generator=torch.Generator().manual_seed(9))
    for level in (0, 1, 2):
        assert torch.equal(linear(x, weight, isa, None, None, level), linear(x, weight, isa))


def test_without_a_pack_the_record_is_read(case: Case, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    w = make_weight(case)
    x = torch.randn(3, case.k, generator=torch.Generator().manual_seed(4))
    y = torch.ops.lutgemm._codebook_linear_cpu(
        x, w.codes, w.codebooks, w.scales, None, None, w.group_size, isa, accuracy
    )
    assert torch.equal(y, linear(x, w, isa, None, None, accuracy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_equals_the_format(case: Case, dtype: torch.dtype, isa: int) -> None:
    weight = make_weight(case)
    expected = weight.dequantize(dtype)
    assert torch.equal(dequantize(weight, isa, dtype), expected)
    begin, end = case.n // 3, case.n - case.n // 4
    assert torch.equal(dequantize(weight, isa, dtype, (begin, end)), expected[begin:end])
    assert dequantize(weight, isa, dtype, (case.n, case.n)).shape == (0, case.k)


@pytest.mark.parametrize("bits", [3, 10])
def test_codes_beyond_the_codebook_stay_inside_it(bits: int, kernel: tuple[int, int]) -> None:
    isa, accuracy = kernel
    w = make_weight(Case(2, 4, bits, 50, 64, 32))
    dtype = w.codes.dtype
    wild = torch.randint(*((0, 256) if bits <= 8 else (-(2**15), 2**15)), w.codes.shape).to(dtype)
    masked = with_tensors(w, w.codebooks, w.scales)
    masked.tensors["codes"] = wild & (2**bits - 1)
    w.tensors["codes"] = wild
    x = torch.randn(5, 64)
    assert torch.equal(linear(x, w, isa, None, None, accuracy), linear(x, masked, isa, None, None, accuracy))
    assert torch.equal(dequantize(w, isa), dequantize(masked, isa))


def test_a_corrupt_pack_is_refused_or_harmless(case: Case, isa: int) -> None:
    weight = make_weight(case)
    packed, x = pack(weight), torch.ones(2, case.k)
    for word in range(16):
        wrong = packed.clone()
        wrong[4 * word] ^= 1
        with pytest.raises(RuntimeError, match="packed: its header"):
            linear(x, weight, isa, packed=wrong)
    for wrong in (packed[:-1].clone(), torch.cat([packed, packed[:1]]), packed[:0], packed[:40].clone()):
        with pytest.raises(RuntimeError, match="packed: its size"):
            linear(x, weight, isa, packed=wrong)
    noise = packed.clone()
    noise[64:] = torch.randint(0, 256, (len(packed) - 64,), dtype=torch.uint8)
    for tokens in (1, 3, 8, 16):
        for level in range(4):
            y = linear(torch.ones(tokens, case.k), weight, isa, None, noise, level)
            assert y.shape == (tokens, case.n)


def test_a_view_of_a_pack_is_read_right_or_refused(isa: int) -> None:
    weight = make_weight(CASES[0])
    packed, x = pack(weight), torch.randn(20, 256)
    for offset in (4, 1):
        view = torch.empty(len(packed) + offset, dtype=torch.uint8)[offset:]
        view.copy_(packed)
        if offset == 4:
            for level in range(4):
                assert torch.equal(
                    linear(x, weight, isa, None, view, level), linear(x, weight, isa, None, packed, level)
                )
        else:
            with pytest.raises(RuntimeError, match="packed: starts at an odd address"):
                linear(x, weight, isa, packed=view)


def arguments() -> dict[str, object]:
    w = make_weight(Case(2, 4, 8, 16, 32, 8))
    return {
        "x": torch.zeros(2, 32),
        "codes": w.codes,
        "codebooks": w.codebooks,
        "scales": w.scales,
        "bias": None,
        "packed": None,
        "group_size": 8,
        "isa": 0,
        "accuracy": 3,
    }


REFUSED = {
    "x of another K": ({"x": torch.zeros(2, 36)}, "codes: got shape"),
    "x of no dimension": ({"x": torch.zeros(())}, "x: got shape"),
    "x of K = 0": ({"x": torch.zeros(2, 0)}, "K=0"),
    "x not contiguous": ({"x": torch.zeros(32, 2).T}, "x: must be contiguous"),
    "x fp64": ({"x": torch.zeros(2, 32, dtype=torch.float64)}, "x: must be float32"),
    "bias of another N": ({"bias": torch.zeros(15)}, "bias: got shape"),
    "bias of another dtype": ({"bias": torch.zeros(16).half()}, "bias: must have the dtype of x"),
    "codes of two dimensions": ({"codes": torch.zeros(16, 8, dtype=torch.uint8)}, "codes: got shape"),
    "codes of five codebooks": ({"codes": torch.zeros(5, 16, 8, dtype=torch.uint8)}, "num_codebooks"),
    "codes of no rows": ({"codes": torch.zeros(2, 0, 8, dtype=torch.uint8)}, r"\(N\)=0"),
    "codes int16 at 8 bits": ({"codes": torch.zeros(2, 16, 8, dtype=torch.int16)}, "codes: must be uint8"),
    "codes not contiguous": ({"codes": torch.zeros(2, 8, 16, dtype=torch.uint8).mT}, "codes: must be contiguous"),
    "codebooks of 3 entries": ({"codebooks": torch.zeros(2, 3, 4).half()}, "power of two"),
    "codebooks of 8192": ({"codebooks": torch.zeros(2, 8192, 4).half()}, "from 2 to 4096"),
    "codebooks of vec_len 3": ({"codebooks": torch.zeros(2, 256, 3).half()}, "vec_len=3"),
    "codebooks of vec_len 8": ({"codebooks": torch.zeros(2, 256, 8).half()}, "codes: got shape"),
    "codebooks too few": ({"codebooks": torch.zeros(1, 256, 4).half()}, "codebooks: got shape"),
    "codebooks of another dtype": ({"codebooks": torch.zeros(2, 256, 4)}, "dtype of scales"),
    "scales too few": ({"scales": torch.zeros(16, 3).half()}, "scales: got shape"),
    "scales integer": ({"scales": torch.zeros(16, 4, dtype=torch.int32)}, "scales: must be float32"),
    "group_size 0": ({"group_size": 0}, "group_size=0"),
    "group_size negative": ({"group_size": -8}, "group_size=-8"),
    "group_size huge": ({"group_size": 2**62}, "group_size="),
    "group_size not of vectors": ({"group_size": 6}, "multiple of vec_len"),
    "group_size other than scales": ({"group_size": 16}, "scales: got shape"),
    "packed of floats": ({"packed": torch.zeros(64)}, "packed: must be uint8"),
    "packed of two dimensions": ({"packed": torch.zeros(2, 64, dtype=torch.uint8)}, "packed: got shape"),
    "isa 4": ({"isa": 4}, "isa=4"),
    "accuracy 4": ({"accuracy": 4}, "accuracy=4"),
    "isa -1": ({"isa": -1}, "isa=-1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lutgemm._codebook_linear_cpu(*(arguments() | change).values())


@pytest.mark.parametrize(
    ("rows", "dtype", "message"),
    [
        ((-1, 4), torch.float32, "row_begin=-1"),
        ((0, 17), torch.float32, "row_end=17"),
        ((5, 4), torch.float32, "row_end=4"),
        ((0, 4), torch.float64, "dtype: must be float32"),
    ],
)
def test_wrong_rows_are_refused(rows: tuple[int, int], dtype: torch.dtype, message: str) -> None:
    a = arguments()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lutgemm._codebook_dequantize_cpu(a["codes"], a["codebooks"], a["scales"], 32, 8, *rows, dtype, 0)


@pytest.mark.parametrize(("k", "message"), [(0, "K=0"), (-4, "K=-4"), (2**62, "K="), (64, "codes: got shape")])
def test_a_wrong_width_is_refused(k: int, message: str) -> None:
    a = arguments()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lutgemm._codebook_pack_cpu(a["codes"], a["codebooks"], a["scales"], k, 8)
