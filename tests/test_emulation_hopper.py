"""The host emulation of what only sm_90a has: barriers in shared memory, bulk copies, warpgroup products.

Their values against numpy (tests/emulation/hopper.cu, on a GPU too where there is one of compute capability 9.0), and
the faults that the emulator is there to find (hopper_faults.cu).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cuda_budget
import numpy as np
import pytest
import torch
from conftest import REQUIRED
from emulated_build import ROOT
from emulated_kernels import NVCC, Emulator, Gpu, call_kernel, emulator_or_skip

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
MACHINES = ["emulator", pytest.param("gpu", marks=pytest.mark.gpu)] if NVCC and HAS_HOPPER else ["emulator"]
TOKENS = (8, 16, 32, 64, 96, 128, 192, 256)


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    emulator = emulator_or_skip()
    yield emulator
    emulator.set(checks=1, races=1, seed=0, architecture=90)


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Emulator | Gpu:
    return Gpu() if request.param == "gpu" else emulator_or_skip()


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """16-bit floats as bits, and their values in fp64."""
    values = torch.randn(shape, generator=torch.manual_seed(seed)).to(dtype)
    return values.view(torch.int16).numpy(), values.double().numpy()


# ---- values


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("layout", [0, 1, 2], ids=["along K", "along tokens", "with gaps"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wgmma_is_a_matrix_product(machine: Emulator | Gpu, tokens: int, layout: int, dtype: torch.dtype) -> None:
    a, a_values = random_values((64, 32), dtype, 1)
    b, b_values = random_values((tokens, 32), dtype, 2)
    n = layout + (4 if dtype is torch.bfloat16 else 0)
    shared = tokens * 64 + 1024
    y = np.zeros((2, 64, tokens), np.float32)
    y = machine.hopper(f"product_{tokens}", y, a, b, n=n, threads_x=256, dynamic_shared=shared)
    for of_warpgroup in y:
        np.testing.assert_allclose(of_warpgroup, 1 + a_values @ b_values.T, rtol=0, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 11])
def test_products_of_a_ring_that_bulk_copies_fill(machine: Emulator | Gpu, steps: int) -> None:
    a, a_values = random_values((64, 16 * steps), torch.float16, 3)
    b, b_values = random_values((16 * steps, 32), torch.float16, 4)
    # [step][half of K][tile of tokens][token][k]
    packed = np.ascontiguousarray(b.reshape(steps, 2, 8, 4, 8).transpose(0, 1, 3, 4, 2))
    y = np.zeros((64, 32), np.float32)
    y = machine.hopper("pipeline", y, a, packed, n=steps, threads_x=160, dynamic_shared=3072)
    np.testing.assert_allclose(y, a_values @ b_values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_ring_in_other_orders_of_warps(emulator: Emulator, seed: int) -> None:
    emulator.set(seed=seed)
    test_products_of_a_ring_that_bulk_copies_fill(emulator, 7)


def test_threads_exchange_values_by_a_barrier_in_shared_memory(machine: Emulator | Gpu) -> None:
    a = np.random.default_rng(5).integers(0, 1000, 96, dtype=np.int32)
    y = machine.hopper("neighbours", np.zeros((5, 96), np.int32), a, n=5, threads_x=96)
    np.testing.assert_array_equal(y, np.cumsum([np.roll(a, -i) for i in range(5)], axis=0))


def test_everything_runs_without_checks(emulator: Emulator) -> None:
    emulator.set(checks=0)
    test_products_of_a_ring_that_bulk_copies_fill(emulator, 7)
    test_threads_exchange_values_by_a_barrier_in_shared_memory(emulator)
    test_wgmma_is_a_matrix_product(emulator, 32, 2, torch.float16)


# ---- faults

NEVER_WRITTEN = "uninitialised: .* was not written by this block, or only by a thread that no barrier orders before"
FAULTS = [
    ("barrier_life", 1, "mbarrier: not initialised, byte 0 of shared barriers"),
    ("barrier_life", 2, "mbarrier: initialised twice"),
    ("barrier_life", 3, r"mbarrier: used before thread 0 has called mbarrier_init_fence\(\)"),
    ("barrier_life", 4, "mbarrier: nothing orders this behind its initialisation by thread 0|mbarrier: not init"),
    ("barrier_life", 5, "mbarrier: .* reads 8 bytes .* is part of a barrier"),
    ("barrier_life", 6, "uninitialised|race"),  # half of the threads end the phase for all
    (
        "barrier_life",
        7,
        "deadlock: no thread can go on; 63 threads .* in mbarrier_wait at hopper_faults.cu:.* for phase 1 of the "
        r"barrier at byte 0 of shared barriers .*, which lacks 1 of 64 arrivals .*; 1 thread \(thread 40\) ended",
    ),
    ("barrier_life", 8, "uninitialised|race"),
    ("barrier_life", 9, "uninitialised|race"),  # the wrong parity returns at once
    ("barrier_life", 10, "deadlock: .* for phase 1 .* lacks 64 of 64 arrivals"),  # or waits for the next phase
    ("barrier_life", 11, "mbarrier: misaligned"),
    ("barrier_life", 12, "mbarrier: the address is not in shared memory"),
    ("barrier_life", 13, "mbarrier: 1 to 1048575 arrivals are possible"),
    ("barrier_life", 14, "mbarrier: the emulator has 64 in a block at most"),
    ("barrier_life", 15, "mbarrier: a parity is 0 or 1"),
    ("arrival_order", 1, NEVER_WRITTEN + "|race: .* was written by thread 33, nothing between"),
    ("arrival_order", 2, "race: .* was written by thread 32, nothing between that orders them"),
    ("arrival_order", 3, NEVER_WRITTEN + "|race"),
    ("arrival_order", 4, "race: thread 0 writes 4 bytes .* was read by thread"),
    (
        "bulk",
        1,
        "bulk copy: misaligned, both addresses and the bytes are multiples of 16, thread 0 at hopper_faults.cu",
    ),
    ("bulk", 2, "bulk copy: of no bytes"),
    ("bulk", 3, "bulk copy: misaligned"),
    ("bulk", 4, "out of bounds: thread 0 writes 1024 bytes .* 0 bytes behind the end of shared"),
    ("bulk", 5, "bulk copy: the target is not in shared memory"),
    ("bulk", 6, "too early: thread 0 reads 1024 bytes"),
    ("bulk", 7, "out of bounds: thread 0 reads 1024 bytes .* the nearest memory is a of 1024 bytes"),
    ("bulk", 8, r"mbarrier: used before thread 0 has called mbarrier_init_fence\(\)"),
    (
        "bulk",
        9,
        r"race: thread 0 writes 1024 bytes .* was read by|mbarrier: two phases have ended while a thread waited",
    ),
    ("bulk", 10, "mbarrier: bulk copies of 1024 bytes in a phase that expects 512"),
    ("bulk", 11, "deadlock: .* which lacks 0 of 1 arrivals and 1024 of 2048 bytes"),
    ("bulk", 12, "bulk copy not waited for: the block has ended, and no thread waited for phase 1"),
    (
        "bulk",
        13,
        "bulk copy not waited for: .* was written by a bulk copy for phase 0 of the barrier at byte 0 of shared",
    ),
    ("bulk", 14, "bulk copy not waited for: thread .* reads 1 bytes"),
    ("bulk", 15, "bulk copy not waited for|race: thread 0 writes 1024 bytes .* was read by"),  # the wrong parity
    ("bulk", 16, "no proxy fence: thread 0 writes 1024 bytes .*: byte 5 of .* was written by thread 5"),
    ("bulk", 18, "no proxy fence: thread 0 writes 1024 bytes .* was written by thread 0"),
    ("bulk", 20, "mbarrier: a phase expects 1048575 bytes at most"),
    ("bulk", 21, "mbarrier: more than 1 arrivals in a phase"),
    ("product", 1, "uninitialised: thread .* reads 128 bytes .*: byte 144 of shared"),
    ("product", 2, r"no proxy fence: .* was written by thread 0, which has not called fence_async_proxy\(\)"),
    ("product", 3, "no proxy fence: .* was written by thread 0"),  # behind the barrier
    ("product", 4, "race: .* was written by thread 0, nothing .* which thread [0-9]+ has not seen|uninitialised"),
    (
        "product",
        5,
        r"divergence: .* 96 threads .* in wgmma at hopper_faults.cu.* 32 threads \(first: thread 96\) ended",
    ),
    ("product", 6, "wgmma_descriptor: its numbers are multiples of 16"),
    ("product", 7, "out of bounds: thread .* reads 128 bytes .* behind the end of shared"),
    ("product", 8, "divergence: threads of one warpgroup .* or with different descriptors"),
    ("product", 9, r"wgmma: thread .* has not called wgmma_fence\(\)"),
    ("product", 10, "divergence: threads of one warpgroup are in wgmma at hopper_faults.cu.* and at hopper_faults.cu"),
    ("product", 11, "wgmma not waited for: the block has ended"),  # not committed
    ("product", 12, "wgmma: thread 50 has written accumulators of a product under way"),
    (
        "product",
        13,
        "wgmma not waited for: thread 50 writes 1 bytes .*: byte 511 of .* was read by a product of warp 0",
    ),
    ("product", 15, "wgmma not waited for: the block has ended"),  # one group is left
    ("product", 16, "wgmma not waited for: the block has ended"),
    ("product", 17, "wgmma not waited for: thread 50 writes 1 bytes .* was read by a product of warp 0"),
    ("product", 18, r"wgmma: thread .* has not called wgmma_fence\(\)"),  # since the wait
    ("product", 21, "wgmma: thread .* calls hold_registers.. on accumulators of a product under way"),
    ("product", 22, r"divergence: thread .* has called wgmma_commit\(\) [01] times before the product"),
    ("product", 20, "wgmma not waited for: thread [0-9]+ writes 1 bytes .* was read by a product of warp [1-3]"),
]
RIGHT = [("barrier_life", 0), ("arrival_order", 0), ("product", 0), ("product", 19)]
RIGHT += [("bulk", n) for n in (0, 17, 19, 22, 23)]
SHAPES = {"bulk": {"threads_x": 64, "dynamic_shared": 1024}, "product": {"threads_x": 128, "dynamic_shared": 512}}


def fault(emulator: Emulator, kernel: str, n: int, y: np.ndarray | None = None, **changes: int) -> str | None:
    """The error of the launch, if any."""
    a, b = np.ones(1024, np.uint8), np.ones(1024, np.uint8)
    y = np.zeros(256, np.float32) if y is None else y
    memory = [(array.ctypes.data, array.nbytes) for array in (y, a, b)]
    shape = {**SHAPES.get(kernel, {"threads_x": 64}), "dependent": kernel == "bulk" and n == 6, **changes}
    return call_kernel(emulator.run_hopper_fault, kernel, *memory, n=n, **shape)


@pytest.mark.parametrize(("kernel", "n", "message"), FAULTS, ids=[f"{f[0]}-{f[1]}" for f in FAULTS])
def test_fault_is_reported_and_survived(emulator: Emulator, kernel: str, n: int, message: str) -> None:
    for seed in range(3):  # other warps come first
        emulator.set(seed=seed)
        error = fault(emulator, kernel, n)
        assert error is not None, "the fault was not seen"
        assert re.search(message, error), error
        assert "[kernel hopper_faults.cu:" in error, error
        assert fault(emulator, kernel, 0) is None, "the kernel without its fault"


@pytest.mark.parametrize(("kernel", "n"), RIGHT, ids=[f"{f[0]}-{f[1]}" for f in RIGHT])
def test_right_orders_are_accepted(emulator: Emulator, kernel: str, n: int) -> None:
    for seed in range(4):
        emulator.set(seed=seed)
        assert fault(emulator, kernel, n) is None


def test_accumulators_are_nan_until_the_wait(emulator: Emulator) -> None:
    y = np.zeros(128, np.float32)
    assert fault(emulator, "product", 14, y) is None
    assert np.isnan(y).all()
    assert fault(emulator, "product", 0, y) is None
    np.testing.assert_array_equal(y, 32)


def test_a_part_of_a_warpgroup_cannot_multiply(emulator: Emulator) -> None:
    error = fault(emulator, "product", 0, threads_x=96)
    assert error is not None
    assert re.search("thread .* is in no whole warpgroup of 128 threads", error), error


def test_a_device_before_hopper_has_none_of_this(emulator: Emulator) -> None:
    emulator.set(architecture=80)
    for kernel, name in [("bulk", "mbarrier"), ("product", "fence_async_proxy")]:
        assert f"{name}: only sm_90a has it, and the device is of architecture 80" in str(fault(emulator, kernel, 0))


def test_the_emulator_is_as_before_in_the_next_launch(emulator: Emulator) -> None:
    """Cells of shared memory mean something else in a block with such barriers."""
    for n in (9, 16, 0):
        fault(emulator, "bulk", n)
        assert emulator.fault("race_block", 0, threads_x=64) is None
        assert "no barrier between" in str(emulator.fault("race_block", 2, threads_x=64))
        assert emulator.fault("race_block", 0, y=np.zeros(256, np.int32), threads_x=256) is None
        assert fault(emulator, "arrival_order", 0) is None


def test_races_can_be_switched_off(emulator: Emulator) -> None:
    emulator.set(races=0)
    assert fault(emulator, "product", 2) is None
    assert fault(emulator, "arrival_order", 4) is None
    assert "deadlock" in str(fault(emulator, "bulk", 11))


# ---- the same source on the real compiler


def test_nvcc_makes_instructions_of_hopper(tmp_path: Path) -> None:
    """Other architectures: hopper_faults.cu, in test_emulation.py."""
    if NVCC is None:
        (pytest.fail if "nvcc" in REQUIRED else pytest.skip)("nvcc is not on this machine")
    cubin = tmp_path / "hopper.cubin"
    command = [
        str(NVCC),
        "-std=c++17",
        "-O3",
        "-Werror",
        "all-warnings",
        "--resource-usage",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    command += [f"-I{ROOT / 'csrc'}", "-cubin", "-o", str(cubin), str(ROOT / "tests" / "emulation" / "hopper.cu")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "serialized" not in run.stderr, run.stderr
    assert set(re.findall(r"(\d+) bytes spill|(\d+) bytes stack", run.stderr)) <= {("0", ""), ("", "0")}, run.stderr
    nvdisasm = cuda_budget.tool("nvdisasm")
    if nvdisasm is None:
        pytest.skip("nvdisasm is not on this machine")
    sass = subprocess.run([nvdisasm, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    found = set(re.findall(r"\b(?:HGMMA|UBLKCP|SYNCS|WARPGROUP|FENCE)[\w.]*", sass))
    assert {f"HGMMA.64x{n}x16.F32{kind}" for n in TOKENS for kind in ("", ".BF16")} <= found, found
    assert {"UBLKCP.S.G", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "WARPGROUP.ARRIVE", "FENCE.VIEW.ASYNC.S"} <= found, found
    assert "desc[" in "".join(line for line in sass.splitlines() if "UBLKCP" in line), "no copy has a cache hint"
