"""What the processor is: name, caches, features, cores. Where the system does not tell, the answer is empty."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

DEFAULT_CACHE = 32 << 20
"""Assumed last-level cache where the system does not tell."""


@lru_cache(maxsize=1)
def _cpu_info() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def cpu_model() -> str:
    """The name with family and model, where the system tells: virtual machines give many processors one name."""
    numbers = [f"{key.split()[-1]} {_cpu_info()[key]}" for key in ("cpu family", "model") if key in _cpu_info()]
    return f"{cpu_name()} ({' '.join(numbers)})" if numbers else cpu_name()


def cpu_flags() -> set[str]:
    """The processor's features by their Linux names, such as `avx2`."""
    return set(_cpu_info().get("flags", _cpu_info().get("Features", "")).split())


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bytes(text: str) -> int:
    """`"32768K"` -> bytes, as Linux writes the size of a cache."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def cpu_caches() -> dict[str, int]:
    """Bytes of the first core's data caches: `{"L1d": ..., "L2": ..., "L3": ...}`."""
    found: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}d" if level == "1" else f"L{level}"] = _bytes(size)
    return found


def last_level_cache() -> int:
    """Bytes of the largest cache, or `DEFAULT_CACHE`."""
    return max(cpu_caches().values(), default=DEFAULT_CACHE)


def gpu_cache(device: str) -> int:
    """Bytes of the L2 cache of a CUDA device."""
    import torch

    return int(torch.cuda.get_device_properties(device).L2_cache_size)
