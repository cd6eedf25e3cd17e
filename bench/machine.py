"""The header of a run: what measured it, and how fast its memory is."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lutgemm import __version__, _native
from lutgemm.errors import ArgumentError
from lutgemm.testing.hardware import cpu_caches, cpu_name, last_level_cache, usable_cores

BANDWIDTH_REPEATS = 40
"""Passes, of some milliseconds each: among as many, one that nothing interrupts is likely."""
MIN_BANDWIDTH_BYTES = 128 << 20


def _git(*arguments: str) -> str | None:
    """Output of git in the folder of this package, or None where that is no checkout or there is no git."""
    folder = Path(__file__).resolve().parent
    try:
        ran = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def git_state() -> dict[str, Any]:
    """Commit of the checkout that this package runs from, and whether files differ from it; None where installed."""
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = _git("rev-parse", "HEAD") if tracked else None
    status = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def gpu() -> dict[str, Any]:
    """The current CUDA device: its name, multiprocessors, caches, clocks as the driver gives them, and versions."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem"
    try:
        ran = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        told = ran.stdout.strip() if ran.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        told = ""
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        **dict(zip(asked.split(","), (part.strip() for part in told.split(",")), strict=False)),
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
    }


def header(command: list[str] | None = None) -> dict[str, Any]:
    """Machine, versions, commit, date and command of a run, as JSON values. load: processes that want a core, 1 min."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(command if command is not None else ["lutgemm", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "caches": cpu_caches(),
        "gpu": gpu() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lutgemm": __version__,
        **git_state(),
    }


def _probe_bytes() -> int:
    return max(4 * last_level_cache(), MIN_BANDWIDTH_BYTES)


def _best_pass(measure: Callable[[int, int, int], list[float]], threads: int) -> float:
    """Seconds of the fastest pass. Raises `ArgumentError` when the system refuses so many threads."""
    try:
        return min(measure(_probe_bytes(), BANDWIDTH_REPEATS, threads))
    except RuntimeError as error:
        raise ArgumentError(f"threads={threads} is not supported here: {error}") from None


def read_bandwidth(threads: int) -> float:
    """GB/s at which `threads` threads read memory: the wall for one token. Best of many passes over 4 caches.

    Measured by a C++ loop of the host module; without it, by torch's copy.
    """
    host, _ = _native.host()
    if host is None:
        return copy_bandwidth(threads)
    return _probe_bytes() / _best_pass(host.read_bandwidth, threads) / 1e9


def copy_bandwidth(threads: int) -> float:
    """GB/s, bytes read and written both counted, at which `threads` threads copy memory; by torch without the host
    module, with the threads that torch has."""
    host, _ = _native.host()
    nbytes = _probe_bytes()
    if host is not None:
        return 2 * nbytes / _best_pass(host.copy_bandwidth, threads) / 1e9
    source, target = torch.zeros(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8)
    best = float("inf")
    for _ in range(BANDWIDTH_REPEATS):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * nbytes / best / 1e9


def device_copy_bandwidth(nbytes: int = 1 << 30) -> float:
    """GB/s, bytes read and written both counted, at which the current CUDA device copies memory; median of 9 copies."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(10):
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * nbytes / statistics.median(seconds[1:]) / 1e9
