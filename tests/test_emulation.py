"""The host emulation of CUDA kernels: each primitive against numpy or torch. Its checks: test_emulation_faults.py.

The kernels are tests/emulation/*.cu; they are also compiled by nvcc where there is one.
"""

from __future__ import annotations

import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REQUIRED
from emulated_build import ROOT
from emulated_kernels import NVCC, SOURCES, Emulator, Gpu, emulator_or_skip

MACHINES = (
    ["emulator", pytest.param("gpu", marks=pytest.mark.gpu)] if NVCC and torch.cuda.is_available() else ["emulator"]
)


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Emulator | Gpu:
    """What is emulated is right where a GPU gives the same."""
    if request.param == "gpu":
        return Gpu()
    return emulator_or_skip()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# ---- 16-bit floats


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_widening_is_exact_for_every_16_bit_pattern(machine: Emulator | Gpu) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    y = machine.primitive("widen", np.zeros((65536, 2), np.float32), bits, blocks=64, threads_x=1024)
    np.testing.assert_array_equal(y[:, 0], bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(y[:, 1], bfloat16_values(bits))


def test_narrowing_rounds_to_nearest_even(machine: Emulator | Gpu, rng: np.random.Generator) -> None:
    # Any float, floats of half's range with its subnormals, ties between two halves, and the edge of overflow.
    anything = rng.integers(0, 2**32, 30000, dtype=np.uint32).view(np.float32)
    near = (rng.standard_normal(30000) * 10.0 ** rng.integers(-9, 6, 30000)).astype(np.float32)
    halves = rng.integers(0, 0x7C00, 5000).astype(np.uint16).view(np.float16).astype(np.float64)
    ties = (halves + np.spacing(halves.astype(np.float16)).astype(np.float64) / 2).astype(np.float32)
    edge = np.array([65519.996, 65520.0, -65536.0, np.inf, -np.inf, 0.0, -0.0, 3.4e38, np.nan], np.float32)
    values = np.concatenate([anything, near, ties, np.resize(edge, 536)])
    assert values.size == 64 * 1024 - 0
    y = machine.primitive("narrow", np.zeros((values.size, 2), np.uint16), values, blocks=64, threads_x=1024)
    numbers = ~np.isnan(values)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(y[numbers, 0], values[numbers].astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(y[numbers, 1], bfloat16_bits(values)[numbers])
    assert set(y[~numbers].ravel()) == {0x7FFF}


def nearest(exact: Fraction, guess: float, dtype: torch.dtype) -> float:
    """`exact` rounded to dtype, to nearest even, by comparing the neighbours of a guess."""
    middle = torch.tensor(guess, dtype=dtype)
    bits = middle.view(torch.int16)
    candidates = [bits - 1, bits, bits + 1] if (int(bits) & 0x7FFF) else [bits, bits + 1, (bits + 1) | -32768]
    finite = [c for c in candidates if torch.isfinite(c.view(dtype))]
    return min(finite, key=lambda c: (abs(Fraction(float(c.view(dtype))) - exact), int(c) & 1)).view(dtype).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_arithmetic_of_pairs_rounds_once(machine: Emulator | Gpu, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    count = 1024  # triples of pairs
    scale = 2.0 ** torch.randint(-10, 6, (count, 3, 2))
    values = (torch.randn(count, 3, 2) * scale).to(dtype)
    assert values.isfinite().all()
    # Products that all but cancel against the third operand, or end just beside a tie, show a second rounding.
    values[: count // 2, 2] = -(values[: count // 2, 0].double() * values[: count // 2, 1].double()).to(dtype)
    values[count // 2 :, 2] = (torch.randn(count // 2, 2) * 2.0**8).to(dtype)
    a = values.view(torch.int16).numpy()
    name = "arithmetic_half" if dtype is torch.float16 else "arithmetic_bfloat16"
    y = machine.primitive(name, np.zeros((count, 5, 2), np.int16), a, blocks=8, threads_x=128)
    result = torch.from_numpy(y).view(dtype)
    p, q, r = values.double().unbind(1)
    for i, exact in enumerate([p + q, p - q, p * q]):  # exact in fp64
        torch.testing.assert_close(result[:, i].double(), exact.to(dtype).double(), rtol=0, atol=0)
    assert torch.equal(result[:, 4].double(), torch.maximum(p, q))
    wrong = 0
    for a, b, c, got in zip(
        p.ravel().tolist(), q.ravel().tolist(), r.ravel().tolist(), result[:, 3].ravel(), strict=True
    ):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        if abs(exact) < 60000:
            wrong += got.item() != nearest(exact, float(exact), dtype)
    assert wrong == 0, "an fma was rounded twice"


# ---- integers


def signed(values: np.ndarray, bits: int) -> np.ndarray:
    values = values.astype(np.int64) & ((1 << bits) - 1)
    return values - ((values >> (bits - 1)) << bits)


def permuted(u: int, v: int, selector: int, signs: bool) -> int:
    data = (v << 32 | u).to_bytes(8, "little")
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    chosen = [data[n & 7] if not (signs and n & 8) else 255 * (data[n & 7] >> 7) for n in nibbles]
    return int.from_bytes(bytes(chosen), "little")


def test_integer_intrinsics(machine: Emulator | Gpu, rng: np.random.Generator) -> None:
    u = rng.integers(0, 2**32, 512, dtype=np.uint32)
    v = rng.integers(0, 2**32, 512, dtype=np.uint32)
    u[:3] = 0, 1, 0xFFFFFFFF
    u[3:64] = (rng.standard_normal(61) * 10.0 ** rng.integers(0, 11, 61)).astype(np.float32).view(np.uint32)
    u[64] = np.float32(2.5).view(np.uint32)
    got = machine.primitive("integers", np.zeros((512, 24), np.uint32), u, v, blocks=4, threads_x=128)
    U, V = u.astype(object), v.astype(object)
    bytes_u, bytes_v = ([(w >> 8 * i) & 255 for i in range(4)] for w in (U, V))
    halves_u, halves_v = ([(w >> 16 * i) & 0xFFFF for i in range(2)] for w in (U, V))

    def packed(parts: list, bits: int) -> np.ndarray:
        return sum((part % (1 << bits)) << bits * i for i, part in enumerate(parts))

    def lut(table: int) -> np.ndarray:
        c = U >> 3
        terms = [(U if i & 4 else ~U) & (V if i & 2 else ~V) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1]
        return np.bitwise_or.reduce(terms)

    def each(function) -> np.ndarray:
        return np.array([function(int(a), int(b)) for a, b in zip(u, v, strict=True)], object)

    both = (V << 32) | U
    expected = [
        each(lambda a, b: a.bit_count() if hasattr(a, "bit_count") else bin(a).count("1")),
        each(lambda a, b: 32 - a.bit_length()),
        each(lambda a, b: (a & -a).bit_length()),
        each(lambda a, b: int(f"{a:032b}"[::-1], 2)),
        each(lambda a, b: permuted(a, b, a >> 7, signs=False)),
        each(lambda a, b: permuted(a, b, b >> 5, signs=True)),
        (both << (U & 31)) >> 32,
        both >> (U & 31),
        5 + sum(signed(a, 8) * signed(b, 8) for a, b in zip(bytes_u, bytes_v, strict=True)),
        5 + sum(a * b for a, b in zip(bytes_u, bytes_v, strict=True)),
        packed([a + b for a, b in zip(bytes_u, bytes_v, strict=True)], 8),
        packed([a - b for a, b in zip(bytes_u, bytes_v, strict=True)], 8),
        packed([a + b for a, b in zip(halves_u, halves_v, strict=True)], 16),
        packed([a - b for a, b in zip(halves_u, halves_v, strict=True)], 16),
        (U * V) >> 32,
        (signed(u, 32).astype(object) * signed(v, 32).astype(object)) >> 32,
        *(lut(table) for table in (0xE8, 0x96, 0xEA, 0x1D)),
    ]
    for i, values in enumerate(expected):
        np.testing.assert_array_equal(got[:, i].astype(object), values % 2**32, err_msg=str(i))
    with np.errstate(invalid="ignore"):
        floats = u.view(np.float32).astype(np.float64)
    floats = np.where(np.isnan(floats), 0.0, floats)
    for i, rounded, low, high in [
        (20, np.rint(floats), -(2**31), 2**31 - 1),
        (21, np.trunc(floats), -(2**31), 2**31 - 1),
        (22, np.rint(floats), 0, 2**32 - 1),
    ]:
        clipped = np.clip(rounded, low, high).astype(np.int64) % 2**32
        np.testing.assert_array_equal(got[:, i].astype(np.int64), clipped, err_msg=str(i))


# ---- collectives


@pytest.mark.parametrize("n", [0, 1, 3, 7])
def test_shuffles_votes_and_reductions(machine: Emulator | Gpu, rng: np.random.Generator, n: int) -> None:
    threads = 96
    a = rng.integers(6, 2**20, threads, dtype=np.int32)
    a[40] = 5
    got = machine.primitive("shuffles", np.zeros((21, threads), np.int32), a, n=n, threads_x=threads)
    i = np.arange(threads)
    lane, base = i % 32, i - i % 32

    def take(source: np.ndarray) -> np.ndarray:
        return a[base + source]

    def inside(source: np.ndarray, width: int) -> np.ndarray:
        return np.where(source // width == lane // width, source, lane)

    # __shfl_xor_sync reads lower segments of the width, and its own lane instead of a higher one.
    xor8 = np.where((lane ^ n) // 8 > lane // 8, lane, lane ^ n)
    warps = a.reshape(-1, 32)
    ballots = (warps & 1).astype(np.int64) @ (1 << np.arange(32))
    expected = [
        take((i * 7 + n) % 32),
        take(lane // 8 * 8 + n % 8),
        take(inside(lane - n, 32)),
        take(inside(lane - n, 16)),
        take(inside(lane + n, 32)),
        take(inside(lane + n, 4)),
        take(lane ^ n),
        take(xor8),
        7 * take(lane ^ n),
        np.float16(take(lane ^ n) % 1000).astype(np.int32),
        np.repeat(ballots, 32),
        np.repeat((warps % 64 == 5).any(1), 32),
        np.repeat((warps != 5).all(1), 32),
        [sum(1 << j for j in range(32) if a[b + j] % 4 == a[k] % 4) for k, b in zip(i, base, strict=True)],
        np.repeat(warps.sum(1), 32),
        np.repeat(warps.max(1), 32),
        np.repeat(warps.min(1), 32),
        np.where(lane < 16, take(lane ^ 3), -a),
        np.full(threads, (a & 1).sum()),
        np.full(threads, (a % 64 == 5).any()),
        np.full(threads, (a != 5).all()),
    ]
    for row, values in enumerate(expected):
        np.testing.assert_array_equal(got[row].view(np.uint32), np.asarray(values).astype(np.uint32), err_msg=str(row))


@pytest.mark.parametrize("kind", range(6), ids=["f16", "bf16", "s8s8", "u8s8", "s8u8", "u8u8"])
def test_mma_is_a_matrix_product(machine: Emulator | Gpu, rng: np.random.Generator, kind: int) -> None:
    if kind < 2:
        dtype = (torch.float16, torch.bfloat16)[kind]
        a, b = (torch.randn(shape, generator=torch.manual_seed(kind)).to(dtype) for shape in ((16, 16), (16, 8)))
        raw = [t.view(torch.int16).numpy() for t in (a, b)]
        y = machine.primitive("mma", np.zeros((16, 8), np.float32), *raw, n=kind)
        np.testing.assert_allclose(y, 1 + (a.double() @ b.double()).numpy(), rtol=0, atol=2e-5)
        return
    a_type, b_type = [(np.int8, np.int8), (np.uint8, np.int8), (np.int8, np.uint8), (np.uint8, np.uint8)][kind - 2]
    a = rng.integers(0, 256, (16, 32), dtype=np.uint8).view(a_type)
    b = rng.integers(0, 256, (32, 8), dtype=np.uint8).view(b_type)
    y = machine.primitive("mma", np.zeros((16, 8), np.int32), a, b, n=kind)
    np.testing.assert_array_equal(y, 1 + a.astype(np.int32) @ b.astype(np.int32))


@pytest.mark.parametrize("variant", [0, 1, 2, 3], ids=["x4 and x2.trans", "x2", "x2 and x1.trans", "x4.trans"])
def test_ldmatrix_loads_the_fragments_of_mma(machine: Emulator | Gpu, variant: int) -> None:
    a, b = (torch.randn(shape, generator=torch.manual_seed(1)).half() for shape in ((16, 16), (16, 8)))
    stored = [a.T if variant == 3 else a, b.T if variant == 1 else b]
    raw = [t.contiguous().view(torch.int16).numpy() for t in stored]
    y = machine.primitive("mma_ldmatrix", np.zeros((16, 8), np.float32), *raw, n=variant)
    np.testing.assert_allclose(y, (a.double() @ b.double()).numpy(), rtol=0, atol=2e-5)


def test_copies_through_a_ring_of_stages(machine: Emulator | Gpu, rng: np.random.Generator) -> None:
    tiles, copied = 5, 1800
    a = rng.integers(0, 2**31, tiles * 512, dtype=np.uint32)
    y = machine.primitive(
        "copy_ring", np.zeros_like(a), a, np.int32([tiles]), n=copied, threads_x=128, dynamic_shared=4096
    )
    np.testing.assert_array_equal(y, np.where(np.arange(a.size) < copied, 2 * a, 0))


def test_loads_and_copies_of_every_width(machine: Emulator | Gpu, rng: np.random.Generator) -> None:
    a = rng.integers(0, 2**31, (64, 16), dtype=np.uint32)
    y = machine.primitive("copies", np.zeros_like(a), a, threads_x=64, dynamic_shared=4096)
    a[1::2, 15] = 0
    np.testing.assert_array_equal(y, a)


def test_shared_atomics_in_a_block_of_two_dimensions(machine: Emulator | Gpu, rng: np.random.Generator) -> None:
    a = rng.integers(-500, 500, 300, dtype=np.int32)
    y = machine.primitive("atomics", np.zeros(3, np.int32), a, n=300, threads_x=80, threads_y=4)
    np.testing.assert_array_equal(y, [a.sum(), a.max(), 300])


# ---- the same sources on the real compiler


@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("source", [path for path in SOURCES if path.stem != "hopper"], ids=lambda path: path.stem)
def test_nvcc_compiles_the_same_sources(tmp_path: Path, source: Path, architecture: str) -> None:
    if NVCC is None:
        (pytest.fail if "nvcc" in REQUIRED else pytest.skip)("nvcc is not on this machine")
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [str(NVCC), "-std=c++17", "-Werror", "all-warnings", target, f"-I{ROOT / 'csrc'}"]
    command += ["-cubin", "-o", str(tmp_path / "kernels.cubin"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
