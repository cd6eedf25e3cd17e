"""The one timer: several callables in one run, interleaved, each with its median and spread.

Interleaving defeats drift (clock speed, a busy neighbour): all callables see the same minutes. A callable is given as
its copies: one copy is *hot* (the same weights again, cached if they fit), enough copies to exceed the last-level cache
(`cold_copies`) are *cold* (weights come from memory, as in a model of many layers). Each visit to a callable starts
with a call that is not counted, so that what the others left in caches and branch predictors is not measured.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch

from ..errors import ArgumentError
from .hardware import gpu_cache, last_level_cache

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

VISIT_SECONDS = 0.01
"""One visit to a callable lasts at least this long (and two counted calls). Right after a callable that went through
all caches, calls of 350 us took up to 490, code and interpreter being cold too, which they are not between the layers
of a model; tens of calls a visit leave such firsts out of the median, and many visits of each still fit in a second."""
COLD_CACHES = 4
"""Cold copies together exceed the last-level cache by this factor, so that no part of one survives a round."""
MAX_COLD_BYTES = 200 << 20
COLD_GPU_BYTES = 256 << 20
"""Least total of cold copies on a GPU: five times the 50 MB of the largest L2 cache that is common."""
GRAPH_SECONDS = 0.002
GRAPH_CALLS = 100
"""CUDA: one graph holds whole rounds over the copies that last about this long, or as many calls as this where those
are shorter: both hide the launch of the graph."""


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, 10th and 90th percentile, and how many calls (or graph replays) were measured."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Statistics of at least one measured time."""
        if not seconds:
            raise ArgumentError("Timing.of: got no samples, needs at least one")
        ordered = sorted(seconds)
        p10, p90 = (ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.9))
        return cls(1e6 * statistics.median(ordered), 1e6 * p10, 1e6 * p90, len(ordered))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Hold torch's pool to `count` threads (None: leave it) and restore it afterwards. Yields the number in force."""
    before = torch.get_num_threads()
    if count is not None and count < 1:
        raise ArgumentError(f"threads={count} is not supported; use 1 or more")
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def cold_bytes(device: str = "cpu") -> int:
    """Bytes that cold copies exceed together: several times what the device's last cache holds."""
    if torch.device(device).type == "cpu":
        return min(COLD_CACHES * last_level_cache(), MAX_COLD_BYTES)
    return max(COLD_CACHES * gpu_cache(device), COLD_GPU_BYTES)


def cold_copies(nbytes: int, total: int | None = None) -> int:
    """Copies of `nbytes` each that together exceed `total` bytes (default: `cold_bytes()`)."""
    wanted = cold_bytes() if total is None else total
    return max(2, -(-wanted // max(1, nbytes)) + 1)


@contextmanager
def _quiet_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _visit(copies: Sequence[Call], position: int, samples: list[float], deadline: float) -> int:
    """Call the copies in turn from `position`: once uncounted, then counted ones. Returns the next position."""
    copies[position % len(copies)]()
    position += 1
    start = time.perf_counter()
    counted = 0
    while True:
        before = time.perf_counter()
        copies[position % len(copies)]()
        after = time.perf_counter()
        samples.append(after - before)
        position += 1
        counted += 1
        if after > deadline or (counted >= 2 and after - start >= VISIT_SECONDS):
            return position


def time_interleaved(calls: Mapping[Name, Sequence[Call]], seconds: float = 1.0) -> dict[Name, Timing]:
    """Time every callable (name -> its copies) for about `seconds` in all, in turns; at least one sample of each.

    Every copy is called once before, so that its memory is touched and its kernel layout built.
    """
    if not calls or not all(calls.values()):
        raise ArgumentError(f"time_interleaved: got {list(calls)}, each needs at least one copy to call")
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    position = dict.fromkeys(calls, 0)
    for copies in calls.values():
        for call in copies:
            call()
    with _quiet_gc():
        deadline = time.perf_counter() + seconds
        while True:
            for name, copies in calls.items():
                position[name] = _visit(copies, position[name], samples[name], deadline)
            if time.perf_counter() >= deadline:
                return {name: Timing.of(found) for name, found in samples.items()}


def _rounds(copies: Sequence[Call]) -> int:
    """Whole rounds over the copies that one graph takes. Calls them all, so that layouts and workspaces are there."""
    for call in copies:
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for call in copies:
        call()
    end.record()
    end.synchronize()
    seconds = max(1e-9, begin.elapsed_time(end) / 1e3)
    return max(1, round(GRAPH_SECONDS / seconds), -(-GRAPH_CALLS // len(copies)) if seconds < GRAPH_SECONDS else 1)


def time_interleaved_cuda(calls: Mapping[Name, Sequence[Call]], seconds: float = 1.0) -> dict[Name, Timing]:
    """As `time_interleaved`, for calls that only launch work on the current CUDA device.

    Each callable becomes one CUDA graph of whole rounds over its copies; a sample is one replay between two events,
    after one that is not counted, divided by its calls. Has not run on a GPU yet.
    """
    if not calls or not all(calls.values()):
        raise ArgumentError(f"time_interleaved_cuda: got {list(calls)}, each needs at least one copy to call")
    graphs: dict[Name, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, copies in calls.items():
        rounds = _rounds(copies)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in copies:
                    call()
        graphs[name] = graph, rounds * len(copies)
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    deadline = time.perf_counter() + seconds
    while True:
        for name, (graph, count) in graphs.items():
            graph.replay()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end) / 1e3 / count)
        if time.perf_counter() >= deadline:
            return {name: Timing.of(found) for name, found in samples.items()}
