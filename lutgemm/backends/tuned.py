"""Thresholds measured on the user's own processor by `lutgemm tune`, and when they are obeyed.

The file (`tuned_file`) holds an entry for each processor, instruction set and number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..accuracy import ACCURACIES
from ..errors import CheckpointError
from . import tuned_file
from .heuristics import CPU_THRESHOLDS, Threshold
from .tuned_file import FILE_LIMIT as FILE_LIMIT
from .tuned_file import MAX_ENTRIES as MAX_ENTRIES
from .tuned_file import VARIABLE as VARIABLE
from .tuned_file import TunedFile, Unbelievable, read_count, read_text, read_tokens, shown_tokens
from .tuned_file import switched_off as switched_off

FORMAT = "lutgemm-tuned-cpu"
FORMAT_VERSION = 1
MAX_ROWS = 256

KEY = ("cpu", "isa", "threads")
"""Fields that tell entries apart."""

FILE = TunedFile("tuned-cpu.json", FORMAT, FORMAT_VERSION, KEY, "lutgemm tune")


@dataclass(frozen=True)
class Entry:
    """What one run of `lutgemm tune` found."""

    cpu: str
    isa: str
    threads: int
    lutgemm: str
    torch: str
    date: str
    size: int
    """N and K of the weights that were timed"""
    rows: tuple[Threshold, ...]

    def to_json(self) -> dict[str, Any]:
        """The entry as JSON values."""
        head = {name: getattr(self, name) for name in (*KEY, "lutgemm", "torch", "date", "size")}
        return head | {"rows": [row_to_json(row) for row in self.rows]}


def row_to_json(row: Threshold) -> dict[str, Any]:
    """A row as JSON values; null stands for `NO_CROSSING`."""
    return {
        "op": row.op,
        "algorithm": row.algorithm,
        "integer_tables": row.integer_tables,
        "max_cost": row.max_cost,
        "max_tokens": shown_tokens(row.max_tokens),
        "max_tokens_bf16": shown_tokens(row.max_tokens_bf16),
        "min_tokens": shown_tokens(row.min_tokens),
        "accuracy": row.accuracy,
    }


def where_measured(cpu: str, isa: str, threads: int, size: int) -> str:
    """The `device` of a `Threshold`."""
    return f"{cpu}, {isa}, {threads} thread{'s' * (threads != 1)}, N = K = {size}, group_size 128"


def cache_file() -> Path | None:
    """The file of tuned thresholds, there or not; None for a user without a home folder."""
    return FILE.path()


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of the file, rows unchecked; none where there is no file. Raises `CheckpointError` for a bad file."""
    return FILE.read(path)


def _row(row: Any, device: str, date: str) -> Threshold:
    from .cpu import BACKEND

    fields = set(row_to_json(CPU_THRESHOLDS[0]))
    if not isinstance(row, dict) or set(row) != fields:
        raise Unbelievable(f"a row has other fields than {sorted(fields)}")
    op, algorithm, cost, integer = (row[name] for name in ("op", "algorithm", "max_cost", "integer_tables"))
    if not isinstance(op, str) or not isinstance(algorithm, str) or algorithm not in BACKEND.algorithms.get(op, ()):
        raise Unbelievable(f"op {str(op)[:40]!r} has no algorithm {str(algorithm)[:40]!r}")
    if not isinstance(cost, (int, float)) or isinstance(cost, bool) or not 0 < cost < math.inf:
        raise Unbelievable(f"max_cost={str(cost)[:40]} is no positive number")
    if not isinstance(integer, bool):
        raise Unbelievable(f"integer_tables={str(integer)[:40]} is neither true nor false")
    if row["accuracy"] not in ("", *ACCURACIES):
        raise Unbelievable(f"accuracy={str(row['accuracy'])[:40]} is unknown")
    tokens = (read_tokens(row, "max_tokens"), read_tokens(row, "max_tokens_bf16"))
    return Threshold(
        op, algorithm, cost, *tokens, integer, device, date, read_tokens(row, "min_tokens"), row["accuracy"]
    )


def entry_from_json(entry: Mapping[str, Any], path: Path) -> Entry:
    """The entry, every value checked. Raises `CheckpointError` naming the file and what is wrong."""
    try:
        cpu, isa, version, torch_version, date = (
            read_text(entry, n) for n in ("cpu", "isa", "lutgemm", "torch", "date")
        )
        threads, size = read_count(entry, "threads", 1), read_count(entry, "size", 1)
        rows = entry.get("rows")
        if not isinstance(rows, list) or len(rows) > MAX_ROWS:
            raise Unbelievable(f"'rows' is no list of at most {MAX_ROWS}")
        device = where_measured(cpu, isa, threads, size)
        checked = tuple(_row(row, device, date) for row in rows)
    except Unbelievable as error:
        raise CheckpointError(f"{path}: {error}; {FILE.remedy}") from None
    return Entry(cpu, isa, threads, version, torch_version, date, size, checked)


def find(isa: str, threads: int) -> Entry | None:
    """The entry for this processor, of any version of lutgemm, or None. Raises `CheckpointError` for a bad file."""
    from ..testing.hardware import cpu_model

    path = cache_file()
    if path is None:
        return None
    key = (cpu_model(), isa, threads)
    for entry in read_entries(path):
        if tuple(entry.get(name) for name in KEY) == key:
            return entry_from_json(entry, path)
    return None


def save(path: Path, entry: Entry) -> None:
    """Put the entry into the file, in place of one for the same processor, instruction set and threads.

    A file that cannot be read is replaced. Raises `CheckpointError` when it cannot be written.
    """
    FILE.save(path, entry.to_json())


def reset(path: Path, cpu: str, dry_run: bool = False) -> int:
    """Remove what was measured on this processor, and the file when nothing is left or it cannot be read.

    Returns how many entries went. dry_run: how many would. Raises `CheckpointError` when the file cannot be changed.
    """
    return FILE.reset(path, lambda entry: entry.get("cpu") == cpu, dry_run)


@lru_cache(maxsize=64)
def rows(isa: str, threads: int) -> tuple[Threshold, ...]:
    """The thresholds for calls with this instruction set and so many threads: tuned ones that fit, else built-in ones.

    The file is read once for each; `forget` has it read again. Raises `BackendError` for a senseless `LUTGEMM_TUNED`.
    """
    from .. import __version__

    if switched_off():
        return CPU_THRESHOLDS
    try:
        entry = find(isa, threads)
    except CheckpointError as error:
        tuned_file.warn(str(error))
        return CPU_THRESHOLDS
    if entry is None or entry.lutgemm != __version__:
        return CPU_THRESHOLDS
    measured = {(row.op, row.integer_tables) for row in entry.rows}
    return entry.rows + tuple(row for row in CPU_THRESHOLDS if (row.op, row.integer_tables) not in measured)


def forget() -> None:
    """Have the file and `LUTGEMM_TUNED` read again, and every choice made again."""
    from . import forget_choices

    rows.cache_clear()
    tuned_file.warn.cache_clear()
    forget_choices()


def status(isa: str, threads: int) -> str:
    """One line on which thresholds are in use, and why."""
    hint = f"`lutgemm tune` measures this machine with {threads} thread{'s' * (threads != 1)}"
    return tuned_file.status(FILE, lambda: find(isa, threads), hint)
