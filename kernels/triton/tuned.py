"""Configurations measured on the user's own GPU by `lutgemm tune --backend triton`: the file of them, and how they are
found and made.

A file in the user's cache folder (beside the CPU's) has an entry for each GPU and version of Triton; in an entry, the
fastest configuration of each class of problems: a `Task` whose M is the next power of two. A call looks in what was
read at the first one; nothing is ever timed in a call, so nothing is while a CUDA graph is captured.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backends import tuned as on_cpu
from ..checkpoint.atomic import write_file
from ..checkpoint.json_file import dump_json, read_json
from ..errors import BackendError, CheckpointError
from .config import MAX_PARTS, Config, Device, Task, blocks, candidates, power_of_two

FORMAT, FORMAT_VERSION = "lutgemm-tuned-triton", 1
FILE_LIMIT = 4 << 20
MAX_ENTRIES, MAX_CONFIGS = 16, 4096
REMEDY = "run `lutgemm tune --backend triton` again, or delete the file"
ALGORITHMS = ("lut_gemm", "biqgemm", "codegemm", "dequant_gemm")
CANDIDATES = 8
"""How many of the candidates that the model calls cheapest are timed."""
Found = dict[Task, Config]


def cache_file() -> Path | None:
    """The file, there or not; None for a user without a home folder."""
    beside = on_cpu.cache_file()
    return None if beside is None else beside.with_name("tuned-triton.json")


def device_name(index: int | None) -> str:
    """What entries call the GPU of this index."""
    if index is None or not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.get_device_name(index)}, {torch.cuda.get_device_properties(index).multi_processor_count}"


def problem_class(task: Task) -> Task:
    """The task that stands for all of nearly the same M."""
    return task._replace(M=power_of_two(task.M))


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _config(row: Any) -> tuple[Task, Config]:
    """A row of the file, checked: a wrong one must cost time at most, never memory or a wrong result."""
    if not isinstance(row, dict) or not isinstance(row.get("task"), list) or not isinstance(row.get("config"), list):
        raise ValueError("a row has no 'task' or no 'config'")
    name, *sizes = row["task"] or [None]
    numbers = row["config"]
    if name not in ALGORITHMS or len(sizes) != len(Task._fields) - 1 or not all(_whole(n, 1, 2**24) for n in sizes):
        raise ValueError(f"task {str(row['task'])[:80]} is none")
    if len(numbers) != len(Config._fields) or not all(_whole(n, 1, 2**24) for n in numbers):
        raise ValueError(f"config {str(numbers)[:80]} is none")
    task, config = Task(name, *sizes), Config(*numbers)
    known = [one._replace(num_stages=1) for warp in (32, 64) for one in blocks(task, Device(warp=warp))]
    if (
        config._replace(splits=1, num_stages=1) not in known
        or not 1 <= config.num_stages <= 3
        or (name != "biqgemm" and config.splits > MAX_PARTS)
    ):
        raise ValueError(f"config {numbers} is no candidate for task {row['task']}")
    return task, config


def _entries(path: Path) -> list[dict[str, Any]]:
    """The entries of the file, rows unchecked. Raises `CheckpointError` for a bad file."""
    try:
        if not path.exists():
            return []
    except OSError:
        return []
    found = read_json(path, FILE_LIMIT, REMEDY)
    if (found.get("format"), found.get("version")) != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(f"{path}: is not of format {FORMAT!r}, version {FORMAT_VERSION}; {REMEDY}")
    entries = found.get("entries")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path}: 'entries' is no list of objects; {REMEDY}")
    return entries


def _key(device: str) -> dict[str, str]:
    return {"device": device, "triton": metadata.version("triton"), "lutgemm": __version__}


def read(path: Path, device: str) -> Found:
    """What the file has for this device with this Triton and lutgemm. Raises `CheckpointError` for a bad file."""
    key = _key(device)
    for entry in _entries(path):
        if all(entry.get(name) == value for name, value in key.items()):
            rows = entry.get("configs")
            if not isinstance(rows, list) or len(rows) > MAX_CONFIGS:
                raise CheckpointError(f"{path}: 'configs' is no list of at most {MAX_CONFIGS}; {REMEDY}")
            try:
                return dict(map(_config, rows))
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}; {REMEDY}") from None
    return {}


def save(path: Path, device: str, found: Found) -> None:
    """Put configurations into the file beside those there are. Raises `CheckpointError` when it cannot be written."""
    key = _key(device)
    try:
        found = read(path, device) | found
        others = [e for e in _entries(path) if any(e.get(name) != value for name, value in key.items())]
    except CheckpointError:  # what cannot be read is replaced
        others = []
    rows = [{"task": list(task), "config": list(config)} for task, config in found.items()][-MAX_CONFIGS:]
    entry = {**key, "date": datetime.date.today().isoformat(), "configs": rows}
    document = {"format": FORMAT, "version": FORMAT_VERSION, "entries": [*others[-MAX_ENTRIES + 1 :], entry]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, dump_json(document))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}; set XDG_CACHE_HOME") from error


@lru_cache(maxsize=16)
def _in_use(device: str) -> Found:
    path = cache_file()
    if path is None or on_cpu.switched_off():
        return {}
    try:
        return read(path, device)
    except CheckpointError as error:
        warnings.warn(f"tuned configurations are not used: {error}", RuntimeWarning, stacklevel=4)
        return {}


def find(task: Task, device: str) -> Config | None:
    """The configuration measured for tasks like this one, or None. The file is read once; see `forget`."""
    return _in_use(device).get(problem_class(task))


def forget() -> None:
    """Have the file read again."""
    _in_use.cache_clear()


@dataclass(frozen=True)
class Measured:
    """One timed candidate."""

    config: Config
    microseconds: float


def measure(
    task: Task,
    device: Device,
    run: Callable[[Config], torch.Tensor],
    time_us: Callable[[Callable[[], torch.Tensor]], float],
    limit: int = CANDIDATES,
) -> list[Measured]:
    """The cheapest `limit` candidates by the model, timed; the fastest first.

    run: the task with a configuration. One that does not compile, or does not fit into the GPU, is left out; one whose
    result differs from the first one's by more than rounding raises `BackendError`.
    """
    from triton import CompilationError, OutOfResources

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise BackendError("tuning while a CUDA graph is captured would time nothing; tune before, or after")
    found: list[Measured] = []
    expected: torch.Tensor | None = None
    for config in candidates(task, device)[:limit]:
        try:
            y = run(config).double()
        except (CompilationError, OutOfResources):
            continue
        expected = y if expected is None else expected
        if not (y - expected).norm() <= 1e-2 * expected.norm():
            raise BackendError(f"{task} with {config} gives another result: please report this")
        found.append(Measured(config, time_us(lambda config=config: run(config))))  # type: ignore[misc]
    return sorted(found, key=lambda one: one.microseconds)


def best(measured: Iterable[tuple[Task, Sequence[Measured]]]) -> Found:
    """What `save` takes, of what `measure` found for each task."""
    return {problem_class(task): results[0].config for task, results in measured if results}
