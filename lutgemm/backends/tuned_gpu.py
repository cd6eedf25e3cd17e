"""Thresholds measured on the user's own GPU by `lutgemm tune --device cuda`, and when they are obeyed.

The file (`tuned_file`) holds an entry for each kind of GPU. It is read at the first choice of an algorithm, and nothing
is ever measured in a call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..accuracy import ACCURACIES
from ..errors import CheckpointError
from . import tuned_file
from .gpu_heuristics import GPU_THRESHOLDS, GpuThreshold
from .tuned_file import TunedFile, Unbelievable, read_count, read_text, read_tokens, shown_tokens, switched_off

KEY = ("gpu", "capability", "multiprocessors")
FILE = TunedFile("tuned-cuda.json", "lutgemm-tuned-cuda", 1, KEY, "lutgemm tune --device cuda")
MAX_ROWS = 1024
SCALE_KINDS = ("", "uniform")
X_BYTES = (2, 4)
SEVERAL_KINDS = "the GPUs here are of several kinds; set CUDA_VISIBLE_DEVICES to those of one"


class Gpu(NamedTuple):
    """What tells kinds of GPUs apart."""

    name: str
    capability: str
    multiprocessors: int

    @classmethod
    def of(cls, index: int) -> Gpu:
        """The CUDA device of this index."""
        import torch

        properties = torch.cuda.get_device_properties(index)
        return cls(properties.name, f"{properties.major}.{properties.minor}", properties.multi_processor_count)

    def __str__(self) -> str:
        return f"{self.name} (capability {self.capability}, {self.multiprocessors} multiprocessors)"


def kinds() -> list[Gpu]:
    """The kinds of GPUs that torch sees, each once."""
    import torch

    return list(dict.fromkeys(Gpu.of(index) for index in range(torch.cuda.device_count())))


@dataclass(frozen=True)
class Entry:
    """What one run of `lutgemm tune --device cuda` found."""

    gpu: Gpu
    lutgemm: str
    torch: str
    date: str
    rows: tuple[GpuThreshold, ...]

    def to_json(self) -> dict[str, Any]:
        """The entry as JSON values."""
        head = dict(zip(KEY, self.gpu, strict=True))
        versions = {"lutgemm": self.lutgemm, "torch": self.torch, "date": self.date}
        return head | versions | {"rows": [row_to_json(row) for row in self.rows]}


def row_to_json(row: GpuThreshold) -> dict[str, Any]:
    """A row as JSON values; null stands for no limit."""
    return {
        "op": row.op,
        "scale_kind": row.scale_kind,
        "max_accuracy": row.max_accuracy,
        "max_x_bytes": row.max_x_bytes,
        "max_cost": None if row.max_cost == math.inf else row.max_cost,
        "algorithm": row.algorithm,
        "max_tokens": shown_tokens(row.max_tokens),
    }


def _one_of(row: Mapping[str, Any], name: str, known: tuple[Any, ...]) -> Any:
    value = row[name]
    if isinstance(value, (bool, float)) or value not in known:
        raise Unbelievable(f"{name}={str(value)[:40]} is none of {list(known)}")
    return value


def _row(row: Any, device: str, date: str) -> GpuThreshold:
    from .gpu_layouts import algorithms

    fields = set(row_to_json(GPU_THRESHOLDS[0]))
    if not isinstance(row, dict) or set(row) != fields:
        raise Unbelievable(f"a row has other fields than {sorted(fields)}")
    op, algorithm, cost = row["op"], row["algorithm"], row["max_cost"]
    if not isinstance(op, str) or not isinstance(algorithm, str) or (op, algorithm) not in algorithms():
        raise Unbelievable(f"op {str(op)[:40]!r} has no algorithm {str(algorithm)[:40]!r}")
    cost = math.inf if cost is None else cost
    if not isinstance(cost, (int, float)) or isinstance(cost, bool) or not cost > 0:
        raise Unbelievable(f"max_cost={str(cost)[:40]} is no positive number")
    return GpuThreshold(
        op,
        algorithm,
        read_tokens(row, "max_tokens"),
        device,
        date,
        scale_kind=_one_of(row, "scale_kind", SCALE_KINDS),
        max_cost=cost,
        max_x_bytes=_one_of(row, "max_x_bytes", X_BYTES),
        max_accuracy=_one_of(row, "max_accuracy", ACCURACIES),
    )


def entry_from_json(entry: Mapping[str, Any], path: Path) -> Entry:
    """The entry, every value checked. Raises `CheckpointError` naming the file and what is wrong."""
    try:
        gpu = Gpu(read_text(entry, "gpu"), read_text(entry, "capability"), read_count(entry, "multiprocessors", 1))
        version, torch_version, date = (read_text(entry, name) for name in ("lutgemm", "torch", "date"))
        rows = entry.get("rows")
        if not isinstance(rows, list) or len(rows) > MAX_ROWS:
            raise Unbelievable(f"'rows' is no list of at most {MAX_ROWS}")
        checked = tuple(_row(row, str(gpu), date) for row in rows)
    except Unbelievable as error:
        raise CheckpointError(f"{path}: {error}; {FILE.remedy}") from None
    return Entry(gpu, version, torch_version, date, checked)


def find(gpu: Gpu) -> Entry | None:
    """The entry for this kind of GPU, of any version of lutgemm, or None. Raises `CheckpointError` for a bad file."""
    path = FILE.path()
    if path is None:
        return None
    for entry in FILE.read(path):
        if tuple(entry.get(name) for name in KEY) == gpu:
            return entry_from_json(entry, path)
    return None


def save(path: Path, entry: Entry) -> None:
    """Put the entry into the file, in place of one for the same kind of GPU.

    A file that cannot be read is replaced. Raises `CheckpointError` when it cannot be written.
    """
    FILE.save(path, entry.to_json())


def reset(path: Path, gpu: Gpu, dry_run: bool = False) -> int:
    """Remove what was measured on this kind of GPU, and the file when nothing is left or it cannot be read.

    Returns how many entries went. dry_run: how many would. Raises `CheckpointError` when the file cannot be changed.
    """
    return FILE.reset(path, lambda entry: tuple(entry.get(name) for name in KEY) == gpu, dry_run)


@lru_cache(maxsize=1)
def rows() -> tuple[GpuThreshold, ...]:
    """The thresholds for calls on GPUs: tuned ones, before the built-in ones for what they leave out.

    A choice is made once for all GPUs of a process, so where it has several kinds, the built-in ones count. The file is
    read once; `forget` has it read again. Raises `BackendError` for a senseless `LUTGEMM_TUNED`.
    """
    from .. import __version__

    if switched_off() or len(gpus := kinds()) != 1:
        return GPU_THRESHOLDS
    try:
        entry = find(gpus[0])
    except CheckpointError as error:
        tuned_file.warn(str(error))
        return GPU_THRESHOLDS
    if entry is None or entry.lutgemm != __version__:
        return GPU_THRESHOLDS
    return entry.rows + GPU_THRESHOLDS


def forget() -> None:
    """Have the file and `LUTGEMM_TUNED` read again, and every choice made again."""
    from . import forget_choices

    rows.cache_clear()
    tuned_file.warn.cache_clear()
    forget_choices()


def status() -> str:
    """One line on which thresholds calls on GPUs use, and why."""
    gpus = kinds()
    if len(gpus) != 1:
        return f"built in: {SEVERAL_KINDS if gpus else 'torch sees no GPU'}"
    return tuned_file.status(FILE, lambda: find(gpus[0]), f"`{FILE.command}` measures this GPU")
