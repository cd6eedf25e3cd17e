"""Faults that the emulation of CUDA kernels is there to find, planted in tests/emulation/faults.cu, and its counts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest
from emulated_kernels import Emulator, emulator_or_skip


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    emulator = emulator_or_skip()
    emulator.reset_counts()
    yield emulator
    emulator.set(checks=1, races=1, counts=0, seed=0, sm_count=4, architecture=90)


BIG = {"dynamic_shared": 256}
# kernel, n, launch, what the message says. n = 0 is the kernel without its fault.
FAULTS = [
    ("global_read", 1, {"a": np.ones(32, np.int32)}, "out of bounds: thread 31 reads 4 bytes at faults.cu:"),
    ("global_read", -1, {}, "out of bounds: thread 0 reads"),
    ("global_read", 1 << 20, {}, "out of bounds: thread 0 reads"),
    ("global_write", 40, {}, "out of bounds: thread 24 writes 4 bytes"),
    ("global_vector_read", 4, {"a": np.ones(128, np.int32)}, "out of bounds: thread 31 reads 16 bytes"),
    ("global_vector_read", 1, {"a": np.ones(256, np.int32)}, "misaligned: thread 0 reads 16 bytes"),
    ("write_to_input", 1, {}, "read-only: thread 0 writes 4 bytes"),
    ("blocks_share_output", 1, {"blocks": 2}, "race between blocks: thread 0 writes 4 bytes"),
    ("shared_read", 1, {}, "out of bounds: thread 31 reads 4 bytes"),
    ("shared_read", 1 << 15, {}, r"out of bounds: thread \d+ reads 4 bytes .* bytes behind the end of shared table"),
    ("shared_write", 33, BIG, "out of bounds: thread 31 writes 4 bytes"),
    ("shared_write", -1, BIG, "out of bounds: thread 0 writes 4 bytes"),
    ("uninitialised", 8, {}, "uninitialised: thread 7 reads 4 bytes .*: byte 28 of shared table .* was not written"),
    ("uninitialised_later_block", 1, {"blocks": 2}, r"uninitialised: .* of shared table .* block \(1, 0, 0\) of"),
    ("race_block", 1, {"threads_x": 64}, "race: thread|uninitialised"),
    (
        "race_block",
        2,
        {"threads_x": 64},
        "race: thread 0 reads 4 bytes at .* was written by thread 63, no barrier between",
    ),
    ("race_warp", 1, {"threads_x": 64}, "race: thread|uninitialised"),
    ("race_warp", 2, {"threads_x": 64}, "race: thread"),
    ("race_warp", 3, {"threads_x": 64}, "race: thread|uninitialised"),
    ("race_reader", 1, {"threads_x": 64}, "race: thread 1 writes 4 bytes .* was read by thread 0, no barrier between"),
    ("race_readers", 1, {"threads_x": 64}, "race: thread .* was read by several lanes of warp 1, no barrier between"),
    ("race_two_writers", 1, {"threads_x": 64}, "race: thread 1 writes 4 bytes .* was written by thread 0"),
    ("race_atomic", 1, {"threads_x": 64}, "was written by an atomic operation"),
    ("copy_async", 1, BIG, r"cp.async not waited for: thread \d+ reads 4 bytes"),
    ("copy_async", 4, BIG, r"cp.async not waited for: thread \d+ reads 4 bytes"),
    ("copy_async", 2, BIG, "race|cp.async not waited for|uninitialised"),
    ("copy_async", 3, {"dynamic_shared": 128}, "out of bounds: thread 31 reads"),
    ("divergent_exit", 1, {"threads_x": 64}, r"divergence: .* 63 threads .* in __syncthreads .* 1 thread .*40\) ended"),
    ("divergent_site", 1, {"threads_x": 64}, "divergence: thread 0 waits in __syncthreads"),
    ("shuffle_lane_missing", 1, {}, r"divergence: .* in __shfl_xor_sync .* 1 thread .*9\) ended"),
    ("shuffle_from_outside", 1, {}, "shuffle: thread 0 reads lane 20, which does not take part"),
    ("shuffle_meets_vote", 1, {}, "divergence: .*__any_sync"),
    ("too_large_static", 1, {}, "shared memory: with second the block has 49168 bytes of static"),
    ("undefined", 1, {}, "undefined behaviour: an index outside of its array at faults.cu:.*, thread 3"),
    ("undefined", 2, {}, "undefined behaviour: a signed sum overflows at faults.cu:.*, thread 0"),
    ("undefined", 3, {}, "undefined behaviour: a shift by .* at faults.cu:.*, thread 0"),
    ("dependent", 1, {"dependent": 1}, "too early: thread 0 reads 4 bytes .*: b may be in use by the launch before"),
    ("dependent", 2, {"dependent": 1}, "too early: thread 0 writes 4 bytes .*: y may be in use by the launch before"),
    ("dependent", 3, {"dependent": 1}, r"too early: no thread of a dependent launch called grid_dependency_wait\(\)"),
    ("last_dynamic_byte", 256, {**BIG, "threads_x": 1}, "out of bounds: thread 0 writes 1 bytes"),
]


@pytest.mark.parametrize(("kernel", "n", "shape", "message"), FAULTS, ids=[f"{f[0]}-{f[1]}" for f in FAULTS])
def test_fault_is_reported_and_survived(emulator: Emulator, kernel: str, n: int, shape: dict, message: str) -> None:
    error = emulator.fault(kernel, n, **shape)
    assert error is not None, "the fault was not seen"
    assert re.search(message, error), error
    assert "[kernel faults.cu:" in error or kernel.startswith("last_"), error
    if kernel != "too_large_static":
        assert emulator.fault(kernel, 0, **shape) is None, "the kernel without its fault"


def test_faultless_kernels_pass(emulator: Emulator) -> None:
    assert emulator.fault("halves_of_a_word", threads_x=64) is None
    assert emulator.fault("large_static", threads_x=64) is None


@pytest.mark.parametrize(("architecture", "limit"), [(80, 163 * 1024), (90, 227 * 1024)])
def test_shared_memory_is_limited(emulator: Emulator, architecture: int, limit: int) -> None:
    emulator.set(architecture=architecture)
    assert emulator.fault("last_dynamic_byte", limit - 1, threads_x=1, dynamic_shared=limit) is None
    assert f"{limit} are possible" in emulator.fault("last_dynamic_byte", 0, threads_x=1, dynamic_shared=limit + 1)
    assert f"{limit} together" in emulator.fault("large_static", threads_x=1, dynamic_shared=limit - 1024)


def test_impossible_launches_are_refused(emulator: Emulator) -> None:
    assert "1 to 1024 are possible" in emulator.fault("divergent_exit", threads_x=1025)
    assert "a block of 0 threads" in emulator.fault("divergent_exit", threads_x=0)
    assert "0 x 1 x 1 blocks" in emulator.fault("divergent_exit", blocks=0)


def test_threads_take_turns(emulator: Emulator) -> None:
    def run(_: int) -> list[str | None]:
        return [emulator.fault("race_block", threads_x=64) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        assert set(chain(*pool.map(run, range(2)))) == {None}


def test_an_independent_launch_may_touch_everything(emulator: Emulator) -> None:
    assert emulator.fault("dependent", 1) is None
    emulator.set(architecture=80)  # where there is no such launch
    assert emulator.fault("dependent", 2, dependent=1) is None


def test_checks_can_be_switched_off(emulator: Emulator) -> None:
    emulator.set(races=0)
    assert emulator.fault("race_two_writers", 1, threads_x=64) is None
    emulator.set(checks=0)
    assert emulator.fault("write_to_input", 1) is None
    assert "divergence" in emulator.fault("divergent_exit", 1, threads_x=64)
    with pytest.raises(ValueError, match="speed"):
        emulator.set(speed=1)


def test_a_seed_changes_the_order_of_blocks(emulator: Emulator) -> None:
    emulator.set(checks=0)
    last = set()
    for seed in range(5):
        emulator.set(seed=seed)
        y = np.zeros(32, np.float32)
        assert emulator.fault("blocks_share_output", 1, y=y, blocks=9) is None
        last.add(float(y[0]))
    assert len(last) > 1


# ---- counts


def loads(emulator: Emulator, function: str, space: str = "shared") -> tuple[int, int]:
    """(cost, ideal) of a kernel's reads."""
    sites = [
        s for s in emulator.report() if s["function"].endswith(function) and not s["write"] and s["space"] == space
    ]
    assert len(sites) == 1, sites
    assert sites[0]["file"] == "faults.cu"
    assert sites[0]["accesses"] == 1
    return sites[0]["cost"], sites[0]["ideal"]


@pytest.mark.parametrize(
    ("kernel", "stride", "wavefronts", "ideal"),
    [
        ("strided_4", 1, 1, 1),
        ("strided_4", 2, 2, 1),
        ("strided_4", 32, 32, 1),
        ("strided_4", 33, 1, 1),
        ("strided_4", 0, 1, 1),  # one word for all
        ("strided_8", 2, 2, 2),
        ("strided_8", 4, 4, 2),
        ("strided_16", 4, 4, 4),
        ("strided_16", 8, 8, 4),
        ("strided_16", 36, 4, 4),  # rows of 36 words: the usual padding of mma tiles
        ("strided_16", 32, 32, 4),
    ],
)
def test_bank_conflicts_are_counted(emulator: Emulator, kernel: str, stride: int, wavefronts: int, ideal: int) -> None:
    emulator.set(counts=1)
    assert emulator.fault(kernel, stride, dynamic_shared=16384) is None
    assert loads(emulator, kernel) == (wavefronts, ideal)


@pytest.mark.parametrize(("stride", "sectors", "ideal"), [(1, 4, 4), (2, 8, 4), (8, 32, 4), (0, 1, 1)])
def test_memory_sectors_are_counted(emulator: Emulator, stride: int, sectors: int, ideal: int) -> None:
    emulator.set(counts=1)
    a = np.zeros(512, np.int32)
    start = -a.ctypes.data // 4 % 8  # words to the next sector
    assert emulator.fault("strided_global", stride, a[start:]) is None
    assert loads(emulator, "strided_global", "global") == (sectors, ideal)
