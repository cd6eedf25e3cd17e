"""Codebook weights, the CPU's operators on them, and what their results may be off by: for `test_cpu_codebook*.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lutgemm.formats import CodebookWeight

VBMI, EXACT = 3, 3
TABLE_BITS = {0: 8, 1: 14, 2: 16}
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
