"""The timer of benchmarks, and what they read off the hardware."""

import time
from itertools import pairwise

import pytest
import torch
from bench_runs import few_copies

from lutgemm import _native
from lutgemm.bench import machine
from lutgemm.bench.records import Bandwidth
from lutgemm.errors import ArgumentError
from lutgemm.testing import hardware, timing

small_memory = pytest.fixture(autouse=True)(few_copies)


def test_timer_interleaves_and_rotates_the_copies():
    order = []
    calls = {
        "a": [lambda i=i: order.append(("a", i)) for i in range(3)],
        "b": [lambda: (order.append(("b", 0)), time.sleep(0.002))],
    }
    found = timing.time_interleaved(calls, seconds=0.2)
    assert found["b"].median_us > 1500
    assert found["a"].median_us < 500
    assert found["a"].p10_us <= found["a"].median_us <= found["a"].p90_us
    assert order[:4] == [("a", 0), ("a", 1), ("a", 2), ("b", 0)], "every copy is warmed up"
    names = [name for name, _ in order[4:]]
    visits = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    assert len(visits) >= 6, "several visits of each"
    indices = [i for name, i in order[4:] if name == "a"]
    assert all(later == (earlier + 1) % 3 for earlier, later in pairwise(indices))


def test_timer_takes_one_sample_of_what_is_slower_than_its_time():
    found = timing.time_interleaved({"slow": [lambda: time.sleep(0.02)], "fast": [lambda: None]}, seconds=0.001)
    assert found["slow"].samples >= 1
    assert found["fast"].samples >= 1
    with pytest.raises(ArgumentError, match="each needs at least one copy"):
        timing.time_interleaved({"none": []})


def test_timing_statistics():
    found = timing.Timing.of([i * 1e-6 for i in range(1, 102)])
    assert (found.median_us, found.p10_us, found.p90_us, found.samples) == pytest.approx((51, 11, 91, 101))
    with pytest.raises(ArgumentError, match="no samples"):
        timing.Timing.of([])


def test_threads_are_restored():
    before = torch.get_num_threads()

    def fail() -> None:
        with timing.torch_threads(before + 1) as count:
            assert count == torch.get_num_threads() == before + 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == before
    with timing.torch_threads(None) as count:
        assert count == before
    with pytest.raises(ArgumentError, match="threads=0"), timing.torch_threads(0):
        pass


def test_cold_copies_exceed_the_cache(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(timing, "last_level_cache", lambda: 1000)
    assert timing.cold_copies(100) == 41
    assert timing.cold_copies(10**6) == 2
    assert timing.cold_copies(64, total=640) == 11
    monkeypatch.setattr(timing, "last_level_cache", lambda: 10**9)
    assert timing.cold_copies(1 << 20) == 201


def test_hardware_answers():
    assert hardware.cpu_name()
    assert hardware.usable_cores() >= 1
    assert hardware.last_level_cache() >= 1 << 16
    assert hardware._bytes("512K") == 512 << 10
    assert hardware._bytes("36M") == 36 << 20
    assert machine.copy_bandwidth(1) > 0.1
    assert machine.read_bandwidth(1) > 0.1


def test_without_the_host_module_torch_measures_the_memory(monkeypatch):
    monkeypatch.setattr(_native, "host", lambda: (None, "it was left out"))
    assert machine.read_bandwidth(1) > 0.1


def test_threads_that_the_system_refuses(monkeypatch):
    def refuse(*_):
        raise RuntimeError("the system refused thread 900")

    with pytest.raises(ArgumentError, match="threads=1000 is not supported here: the system refused thread 900"):
        machine._best_pass(refuse, 1000)


def test_memory_is_as_fast_as_its_best_measurement():
    assert Bandwidth(5.0, 7.0).best(6.0, 3.0) == Bandwidth(6.0, 7.0)
