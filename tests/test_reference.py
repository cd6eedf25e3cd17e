"""The literal algorithms of `lutgemm.reference`: tables entry by entry, and equality with dequantize-and-matmul."""

import pytest
import torch

from lutgemm import reference
from lutgemm.formats import BCQWeight, CodebookWeight
from lutgemm.testing.cases import CASES, OpCase
from lutgemm.testing.numerics import assert_equal, assert_within, error_bound, exact_result

ALGORITHMS = {
    "bcq_linear": {"lut_gemm": reference.lut_gemm, "biqgemm": reference.biqgemm},
    "codebook_linear": {"codegemm": reference.codegemm},
}


def test_signed_sums_entries_are_the_sums_they_stand_for():
    x = torch.randint(-9, 10, (2, 19), generator=torch.Generator().manual_seed(0)).float()
    tables = reference.signed_sums(x)
    assert tables.shape == (2, 3, 256)
    assert tables.dtype == torch.float32
    for m in range(2):
        for j in range(3):
            for entry in range(256):
                total = 0.0
                for i in range(8):
                    if 8 * j + i < 19:
                        total += float(x[m, 8 * j + i]) * (1 if (entry >> i) & 1 else -1)
                assert float(tables[m, j, entry]) == total, (m, j, entry)


def test_signed_sums_are_antisymmetric_and_sum_in_fp32_for_half_precision():
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).half()
    tables = reference.signed_sums(x)
    assert torch.equal(tables, -tables.flip(-1))
    assert torch.equal(tables, reference.signed_sums(x.float()))


@pytest.mark.parametrize("algorithm", ["lut_gemm", "biqgemm"])
def test_one_look_up_reads_the_byte_of_codes(algorithm):
    """K = 8, one plane, scale 1: y is the table entry whose index is the byte that the row stores."""
    x = torch.tensor([[1.0, 2, 4, 8, 16, 32, 64, 128]])
    codes = torch.arange(256, dtype=torch.int32).view(1, 256, 1)
    weight = BCQWeight.build(codes, torch.ones(1, 256, 1), in_features=8, group_size=8)
    y = ALGORITHMS["bcq_linear"][algorithm](x, weight)
    assert torch.equal(y[0], reference.signed_sums(x)[0, 0])
    assert y[0].tolist() == [2.0 * byte - 255 for byte in range(256)]


def test_one_look_up_reads_the_psumbook():
    """K = vec_len, scale 1: y is the inner product of x with the centroid that the row names."""
    codebooks = torch.randint(-5, 6, (1, 16, 4), generator=torch.Generator().manual_seed(0)).float()
    codes = torch.arange(16, dtype=torch.uint8).view(1, 16, 1)
    weight = CodebookWeight.build(codes, codebooks, torch.ones(16, 1), in_features=4, group_size=4)
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    assert torch.equal(reference.codegemm(x, weight)[0], codebooks[0] @ x[0])


@pytest.mark.parametrize("op", CASES)
def test_exact_linear_is_the_definition(op):
    inputs = OpCase(op=op, M=2, N=3, K=37).inputs()
    y = reference.exact_linear(inputs.x, inputs.weight)
    w = inputs.weight.dequantize()
    assert y.dtype == torch.float64
    for m in range(2):
        for n in range(3):
            total = sum(float(inputs.x[m, k]) * float(w[n, k]) for k in range(37))
            assert abs(float(y[m, n]) - total) <= 1e-12
    assert torch.equal(exact_result(inputs.x, inputs.weight), y)


@pytest.mark.parametrize("op", CASES)
def test_algorithms_equal_dequantize_and_matmul(op):
    """Every case of the registry: the same bits on the exact tier, within the bound on the random one; fp32 results."""
    for case in CASES[op]():
        for tier in ("exact", "random"):
            if not case.has_tier(tier):
                continue
            inputs = case.inputs(tier)
            wide = inputs.x.float()
            truth = exact_result(wide, inputs.weight)
            for name, function in ALGORITHMS[op].items():
                y = function(inputs.x, inputs.weight)
                if tier == "exact":
                    assert_equal(y, truth.float(), f"{case.name} {name}")
                else:
                    assert_within(y, truth, error_bound(wide, inputs.weight, None, name), f"{case.name} {name}")


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_keeps_the_dtype_of_x(op, dtype):
    inputs = OpCase(op=op).inputs()
    y = reference.dequantize(inputs.x.to(dtype), inputs.weight)
    assert y.dtype == dtype
    assert torch.equal(y, inputs.x.to(dtype) @ inputs.weight.dequantize(dtype).T)
