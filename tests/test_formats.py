"""SPEC.md pinned: golden bytes, values, round trips, nested precision, sizes and refusals."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lutgemm
from lutgemm.errors import ArgumentError, FormatError
from lutgemm.formats import (
    FORMAT_VERSION,
    BCQLayout,
    BCQWeight,
    CodebookLayout,
    CodebookWeight,
    layout_from_dict,
    weight_from_state,
)
from lutgemm.formats.bcq import pack_bits, unpack_bits, unpack_signs

SPEC = (Path(lutgemm.__file__).parent / "formats" / "SPEC.md").read_text(encoding="utf-8")


def hex_of(tensor: torch.Tensor) -> str:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes().hex()


def spec_bytes(section: str) -> dict[str, str]:
    """The hex columns of the worked example whose text starts with `section`."""
    text = SPEC[SPEC.index(section) :]
    table = re.search(r"(\|.*\|\n)+", text)
    assert table is not None
    rows = re.findall(r"\| `(\w+)` \| `([0-9a-f ]+)` \|", table.group())
    return {name: digits.replace(" ", "") for name, digits in rows}


def bcq_example() -> BCQWeight:
    bits = torch.zeros(1, 2, 40, dtype=torch.uint8)
    bits[0, 0, [0, 9, 33]] = 1
    bits[0, 1, [31, 32, 39]] = 1
    scales = torch.tensor([[[1, 0.5], [2, 0.25]]], dtype=torch.float16)
    offsets = torch.tensor([[0, -1], [0.5, 0]], dtype=torch.float16)
    return BCQWeight.build(pack_bits(bits), scales, in_features=40, group_size=32, offsets=offsets)


def codebook_example() -> CodebookWeight:
    codebooks = torch.tensor([[[1, 2, 3, 4], [0, 0, 0, 0]], [[0.5] * 4, [-1] * 4]])
    codes = torch.tensor([[[0, 1]], [[1, 0]]], dtype=torch.uint8)
    return CodebookWeight.build(codes, codebooks, torch.tensor([[2.0, 4.0]]), in_features=6, group_size=4)


def random_bcq(kind: str = "free", n: int = 5, k: int = 100, bits: int = 3, group_size: int = 32, **extra) -> BCQWeight:
    generator = torch.Generator().manual_seed(bits * 1000 + k)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    groups = math.ceil(k / group_size)
    codes = pack_bits(torch.rand(bits, n, k, generator=generator) > 0.5)
    if kind == "uniform":
        extra.setdefault("zeros", torch.randint(0, 2**bits, (n, groups), generator=generator).to(torch.uint8))
    if kind == "ratio":
        extra.setdefault("ratios", torch.rand(bits, generator=generator) + 0.5)
    scales = rand(bits if kind == "free" else 1, n, groups)
    return BCQWeight.build(codes, scales, in_features=k, group_size=group_size, scale_kind=kind, **extra)


@pytest.mark.parametrize(
    ("weight", "section"), [(bcq_example(), "BCQ, free, N = 2"), (codebook_example(), "Codebook, N = 1")]
)
def test_spec_example_bytes(weight, section):
    expected = spec_bytes(section)
    assert len(expected) >= 3
    for name, digits in expected.items():
        assert hex_of(weight.state_dict()[name]) == digits, name


def test_spec_example_values():
    w = bcq_example().dequantize()
    picked = [w[0, 0], w[0, 1], w[0, 33], w[0, 34], w[1, 31], w[1, 39]]
    assert [float(v) for v in picked] == [1, -1, -0.5, -1.5, 2.5, 0.25]
    assert bcq_example().bits_per_weight == 3.2
    assert codebook_example().dequantize().tolist() == [[0, 2, 4, 6, 2, 2]]


def test_spec_names_the_version_this_package_writes():
    assert f"lutgemm weight formats, version {FORMAT_VERSION}" in SPEC


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 150), st.integers(0, 2**31 - 1))
def test_pack_unpack_round_trip(planes, n, k, seed):
    bits = torch.randint(0, 2, (planes, n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack_bits(bits)
    assert words.dtype == torch.int32
    assert words.shape == (planes, n, math.ceil(k / 32))
    assert torch.equal(unpack_bits(words, k), bits)
    assert torch.equal(unpack_signs(words, k), bits.float() * 2 - 1)
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    for index in range(k):
        assert torch.equal((unsigned[..., index // 32] >> (index % 32)) & 1, bits[..., index].long())


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["free", "uniform", "ratio"]),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 140),
    st.sampled_from([32, 64, 128]),
)
def test_bcq_state_round_trip_and_values(kind, bits, n, k, group_size):
    weight = random_bcq(kind, n, k, bits, group_size)
    again = weight_from_state("bcq", weight.state_dict())
    assert again.layout == weight.layout
    assert torch.equal(again.dequantize(), weight.dequantize())
    # The definition, written out: one weight at a time in fp64.
    signs = unpack_signs(weight.codes, k, torch.float64)
    w = weight.dequantize().double()
    g = torch.arange(k) // group_size
    if kind == "free":
        expected = (weight.scales.double()[:, :, g] * signs).sum(0)
    elif kind == "ratio":
        expected = (weight.scales.double()[0][:, g] * (weight.ratios.double()[:, None, None] * signs)).sum(0)
    else:
        place = 2.0 ** torch.arange(bits - 1, -1, -1)
        integer = (place[:, None, None] * (signs + 1) / 2).sum(0)
        expected = weight.scales.double()[0][:, g] * (integer - weight.zeros.double()[:, g])
    assert (w - expected).abs().max() <= 1e-6 * (1 + expected.abs().max()) * bits


def test_bcq_plane_scales_and_offsets_are_the_free_form():
    for kind in ("free", "uniform", "ratio"):
        extra = {"offsets": torch.randn(5, 4).half()} if kind != "uniform" else {}
        weight = random_bcq(kind, **extra)
        free = BCQWeight.build(
            weight.codes,
            weight.plane_scales().float(),
            in_features=100,
            group_size=32,
            offsets=None if weight.plane_offsets() is None else weight.plane_offsets().float(),
        )
        torch.testing.assert_close(free.dequantize(), weight.dequantize(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("codebook_bits", [1, 5, 8, 9, 12])
@pytest.mark.parametrize("vec_len", [2, 4, 8, 16])
def test_codebook_state_round_trip_and_values(codebook_bits, vec_len):
    n, k, num_codebooks, group_size = 3, 37, 2, 32
    j = math.ceil(k / vec_len)
    generator = torch.Generator().manual_seed(codebook_bits)
    dtype = torch.uint8 if codebook_bits <= 8 else torch.int16
    codes = torch.randint(0, 2**codebook_bits, (num_codebooks, n, j), generator=generator).to(dtype)
    codebooks = torch.randn(num_codebooks, 2**codebook_bits, vec_len, generator=generator).half()
    scales = torch.rand(n, 2, generator=generator).half()
    weight = CodebookWeight.build(codes, codebooks, scales, in_features=k, group_size=group_size)
    again = weight_from_state("codebook", weight.state_dict())
    assert again.layout == weight.layout == layout_from_dict(weight.layout.to_dict(), n, k)
    for row in range(n):
        for col in range(k):
            parts = [codebooks[c, int(codes[c, row, col // vec_len]), col % vec_len].double() for c in range(2)]
            expected = float(sum(parts) * scales[row, col // group_size].double())
            assert abs(float(again.dequantize()[row, col]) - expected) <= 1e-6 * (1 + abs(expected))


def test_dequantize_rows_and_dtype():
    weight = random_bcq(n=9)
    whole = weight.dequantize()
    assert torch.equal(weight.dequantize(rows=slice(2, 7)), whole[2:7])
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(weight.dequantize(torch.float16), whole.half())


def test_nested_precision_shares_codes():
    nested = {2: (torch.randn(2, 5, 4).half(), torch.randn(5, 4).half())}
    weight = random_bcq(bits=4, offsets=torch.randn(5, 4).half(), nested=nested)
    assert weight.layout.nested_bits == (2,)
    low = weight.at(bits=2)
    assert low.codes.data_ptr() == weight.codes.data_ptr()
    assert torch.equal(low.scales, nested[2][0])
    assert torch.equal(low.offsets, nested[2][1])
    plain = weight.at(bits=3)
    assert torch.equal(plain.scales, weight.scales[:3])
    assert torch.equal(plain.offsets, weight.offsets)
    assert plain.layout.nested_bits == (2,)
    assert torch.equal(plain.at(bits=2).dequantize(), low.dequantize())
    assert weight.at(bits=4) is weight
    again = BCQWeight.from_state_dict(weight.state_dict())
    assert torch.equal(again.at(bits=2).dequantize(), low.dequantize())
    for bad in (0, 5, True, 2.0):
        with pytest.raises(ArgumentError, match="bits="):
            weight.at(bits=bad)


def test_nested_uniform_is_the_leading_bits_recentred():
    weight = random_bcq("uniform", bits=4)
    low = weight.at(bits=2)
    assert low.codes.data_ptr() == weight.codes.data_ptr()
    signs = unpack_signs(weight.codes, 100)
    integer = sum(2 ** (3 - b) * (signs[b] + 1) / 2 for b in range(4))
    centre = (integer // 4) * 4 + 1.5
    g = torch.arange(100) // 32
    expected = weight.scales[0].float()[:, g] * (centre - weight.zeros.float()[:, g])
    torch.testing.assert_close(low.dequantize(), expected, rtol=1e-6, atol=1e-5)


def test_nested_ratio_keeps_the_first_ratios():
    low = random_bcq("ratio").at(bits=1)
    assert torch.equal(low.ratios, random_bcq("ratio").ratios[:1])


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (BCQLayout(4096, 4096, 3, 64, has_offsets=True), 3 + 16 * 4 / 64),
        (BCQLayout(4096, 4096, 2, 128, has_offsets=False), 2 + 16 * 2 / 128),
        (BCQLayout(4096, 4096, 4, 64, "uniform", has_offsets=False), 4 + 24 / 64),
        (BCQLayout(10, 33, 1, 32, has_offsets=False), (2 * 32 + 2 * 16) / 33),
        (CodebookLayout(4096, 4096, 1, 4, 8, 128), 2 + 16 / 128 + 16 * 256 * 4 / 4096**2),
        (CodebookLayout(64, 64, 2, 8, 12, 64), 2 * 16 / 8 + 16 / 64 + 16 * 2 * 4096 * 8 / 64**2),
    ],
)
def test_bits_per_weight_formula(layout, expected):
    assert layout.bits_per_weight == pytest.approx(expected, rel=1e-12)


def test_layout_dict_round_trip():
    for weight in (random_bcq(), random_bcq("uniform"), random_bcq("ratio"), bcq_example(), codebook_example()):
        assert layout_from_dict(weight.layout.to_dict(), *weight.shape) == weight.layout


def test_layout_dict_refuses_unknown_and_missing_fields():
    with pytest.raises(FormatError, match="format='gguf' is unknown"):
        layout_from_dict({"format": "gguf"}, 4, 4)
    with pytest.raises(ArgumentError, match="unknown fields"):
        layout_from_dict({**random_bcq().layout.to_dict(), "surprise": 1}, 5, 100)
    for entry in ({"format": "codebook", "vec_len": 4}, {"format": "bcq", "bits": 3}):
        with pytest.raises(ArgumentError, match="missing fields"):
            layout_from_dict(entry, 5, 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"bits": "3"}, "bits='3'"),
        ({"group_size": 48}, "group_size=48"),
        ({"group_size": -32}, "group_size=-32"),
        ({"group_size": 0}, "group_size=0"),
        ({"scale_kind": "log"}, "scale_kind='log'"),
        ({"scale_kind": "uniform"}, "has_offsets=True"),
        ({"scale_dtype": "float64"}, "scale_dtype='float64'"),
        ({"out_features": -1}, "out_features=-1"),
        ({"in_features": 2**40}, "in_features="),
        ({"nested_bits": (3,)}, "nested_bits=3"),
        ({"nested_bits": (2, 1)}, "increasing"),
    ],
)
def test_bcq_layout_refusals(change, message):
    good = {"out_features": 8, "in_features": 64, "bits": 3, "group_size": 32}
    BCQLayout(**good)
    with pytest.raises(ArgumentError, match=re.escape(message)):
        BCQLayout(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_codebooks": 5}, "num_codebooks=5"),
        ({"vec_len": 3}, "vec_len=3"),
        ({"codebook_bits": 13}, "codebook_bits=13"),
        ({"group_size": 6}, "group_size=6"),
    ],
)
def test_codebook_layout_refusals(change, message):
    good = {
        "out_features": 8,
        "in_features": 64,
        "num_codebooks": 1,
        "vec_len": 4,
        "codebook_bits": 8,
        "group_size": 32,
    }
    CodebookLayout(**good)
    with pytest.raises(ArgumentError, match=re.escape(message)):
        CodebookLayout(**{**good, **change})


def corrupt(state: dict, name: str, value: torch.Tensor) -> dict:
    return {**state, name: value}


def header_with(weight, word: int, value: int) -> torch.Tensor:
    header = weight.state_dict()["header"].clone()
    header[word] = value
    return header


@pytest.mark.parametrize("word", range(8))
@pytest.mark.parametrize("value", [-1, 77, 2**31 - 1])
@pytest.mark.parametrize("weight", [bcq_example(), codebook_example()], ids=["bcq", "codebook"])
def test_hostile_header_is_refused(weight, word, value):
    state = corrupt(weight.state_dict(), "header", header_with(weight, word, value))
    group_size_beyond_k_is_one_group = word == 4 and value == 2**31 - 1
    with pytest.raises(FormatError):
        type(weight).from_state_dict(state)
    assert not group_size_beyond_k_is_one_group or weight.group_size < 77


def test_unknown_version_names_the_known_one():
    weight = bcq_example()
    with pytest.raises(FormatError, match="format version 2 is unknown; this lutgemm reads version 1"):
        BCQWeight.from_state_dict(corrupt(weight.state_dict(), "header", header_with(weight, 0, 2)))


@pytest.mark.parametrize("weight", [bcq_example(), codebook_example()], ids=["bcq", "codebook"])
def test_damaged_state_is_refused(weight):
    state = weight.state_dict()
    kind = type(weight)
    for name in state:
        if name != "offsets":  # optional: without it the weight is another, valid one
            with pytest.raises(FormatError, match="missing tensor"):
                kind.from_state_dict({key: value for key, value in state.items() if key != name})
        with pytest.raises(FormatError, match=name):
            kind.from_state_dict(corrupt(state, name, state[name].flatten()[:-1]))
        with pytest.raises(FormatError, match="scale_dtype" if name == "scales" else name):
            kind.from_state_dict(corrupt(state, name, state[name].to(torch.float64)))
    with pytest.raises(FormatError, match="unexpected tensors"):
        kind.from_state_dict(corrupt(state, "extra", torch.zeros(1)))
    for bad in (math.nan, math.inf):
        scales = state["scales"].clone()
        scales.view(-1)[0] = bad
        with pytest.raises(FormatError, match="scales holds NaN or Inf"):
            kind.from_state_dict(corrupt(state, "scales", scales))


def test_padding_bits_are_refused():
    state = bcq_example().state_dict()
    codes = state["codes"].clone()
    codes[0, 1, 1] |= 1 << 8
    with pytest.raises(FormatError, match="bits set beyond in_features=40"):
        BCQWeight.from_state_dict(corrupt(state, "codes", codes))


@pytest.mark.parametrize("codebook_bits", [1, 10])
def test_codes_beyond_the_codebook_are_refused(codebook_bits):
    dtype = torch.uint8 if codebook_bits <= 8 else torch.int16
    codebooks = torch.zeros(1, 2**codebook_bits, 4)
    weight = CodebookWeight.build(
        torch.zeros(1, 2, 3, dtype=dtype), codebooks, torch.ones(2, 1), in_features=12, group_size=12
    )
    for bad in (2**codebook_bits, -1) if dtype == torch.int16 else (2, 255):
        codes = weight.codes.clone()
        codes[0, 1, 2] = bad
        with pytest.raises(FormatError, match="centroids"):
            CodebookWeight.from_state_dict(corrupt(weight.state_dict(), "codes", codes))


def test_build_refuses_what_does_not_fit_together():
    with pytest.raises(FormatError, match="codes"):
        BCQWeight.build(torch.zeros(2, 2, dtype=torch.int32), torch.zeros(1), in_features=32, group_size=32)
    codes = torch.zeros(1, 2, 1, dtype=torch.int32)
    with pytest.raises(FormatError, match="scales: got float32"):
        BCQWeight.build(codes, torch.zeros(1, 3, 1), in_features=32, group_size=32)
    with pytest.raises(FormatError, match="power of two"):
        CodebookWeight.build(
            torch.zeros(1, 2, 1, dtype=torch.uint8),
            torch.zeros(1, 3, 4),
            torch.zeros(2, 1),
            in_features=4,
            group_size=4,
        )


def test_repr_tells_shape_and_size():
    assert "2x40, 3.20 bits per weight" in repr(bcq_example())


def test_a_group_size_far_beyond_k_costs_no_memory_and_changes_nothing():
    codes, scales = pack_bits(torch.rand(2, 3, 50) > 0.5), torch.rand(2, 3, 1).half()
    huge = BCQWeight.build(codes, scales, in_features=50, group_size=2**24)
    row = BCQWeight.build(codes, scales, in_features=50, group_size=50)
    assert torch.equal(huge.dequantize(), row.dequantize())
    x = torch.randn(2, 50)
    assert torch.equal(lutgemm.bcq_linear(x, huge), lutgemm.bcq_linear(x, row))
    assert torch.equal(
        lutgemm.bcq_linear(x, huge, backend="reference", algorithm="lut_gemm"),
        lutgemm.bcq_linear(x, row, backend="reference", algorithm="lut_gemm"),
    )
