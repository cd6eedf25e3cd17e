"""Configurations measured on the user's own GPU by `lutgemm tune --backend triton`: the file of them, and how they are
found and made.

A file in the user's cache folder (beside the CPU's) has an entry for each GPU and version of Triton; in an entry, the
fastest configuration of each class of problems: a `Task` whose M is a `token_class`. A call looks in what was read at
the first one; nothing is ever timed in a call, so nothing is while a CUDA graph is captured.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backends.tuned_file import VARIABLE, TunedFile, switched_off
from ..errors import BackendError, CheckpointError
from .config import MAX_PARTS, Config, Device, Task, blocks, candidates, token_class

FORMAT, FORMAT_VERSION = "lutgemm-tuned-triton", 1
COMMAND = "lutgemm tune --backend triton"
FILE = TunedFile("tuned-triton.json", FORMAT, FORMAT_VERSION, ("device", "triton", "lutgemm"), COMMAND)
MAX_CONFIGS = 4096
ALGORITHMS = ("lut_gemm", "biqgemm", "codegemm", "dequant_gemm")
CANDIDATES = 8
"""How many of the candidates that the model calls cheapest are timed."""
Found = dict[Task, Config]


def device_name(index: int | None) -> str:
    """What entries call the GPU of this index."""
    if index is None or not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.get_device_name(index)}, {torch.cuda.get_device_properties(index).multi_processor_count}"


def problem_class(task: Task) -> Task:
    """The task that stands for all of nearly the same M."""
    return task._replace(M=token_class(task.M))


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


def _key(device: str) -> dict[str, str]:
    return {"device": device, "triton": metadata.version("triton"), "lutgemm": __version__}


def read(path: Path, device: str) -> Found:
    """What the file has for this device with this Triton and lutgemm. Raises `CheckpointError` for a bad file."""
    key = _key(device)
    for entry in FILE.read(path):
        if all(entry.get(name) == value for name, value in key.items()):
            rows = entry.get("configs")
            if not isinstance(rows, list) or len(rows) > MAX_CONFIGS:
                raise CheckpointError(f"{path}: 'configs' is no list of at most {MAX_CONFIGS}; {FILE.remedy}")
            try:
                return dict(map(_config, rows))
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}; {FILE.remedy}") from None
    return {}


def save(path: Path, device: str, found: Found) -> None:
    """Put configurations into the file beside those there are. Raises `CheckpointError` when it cannot be written."""
    with suppress(CheckpointError):  # what cannot be read is replaced
        found = read(path, device) | found
    rows = [{"task": list(task), "config": list(config)} for task, config in found.items()][-MAX_CONFIGS:]
    FILE.save(path, {**_key(device), "date": datetime.date.today().isoformat(), "configs": rows})


@lru_cache(maxsize=16)
def _in_use(device: str) -> Found:
    path = FILE.path()
    if path is None or switched_off():
        return {}
    try:
        return read(path, device)
    except CheckpointError as error:
        warnings.warn(f"tuned configurations are not used: {error}", RuntimeWarning, stacklevel=4)
        return {}


def find(task: Task, device: str) -> Config | None:
    """The configuration measured for tasks like this one, or None. The file is read once; see `forget`."""
    return _in_use(device).get(problem_class(task))


def status(device: str) -> str:
    """One line on which configurations calls on the GPU of this name use, and why."""
    path = FILE.path()
    try:
        if switched_off():
            return f"estimated ({VARIABLE}=0)"
        found = {} if path is None else read(path, device)
    except (BackendError, CheckpointError) as error:
        return f"estimated: {error}"
    if not found:
        return f"estimated; `{COMMAND}` measures them"
    return f"measured for {len(found)} problems ({path}), else estimated"


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
