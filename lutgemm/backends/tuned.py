"""Thresholds measured on the user's own machine by `lutgemm tune`: the file that keeps them, and when it is obeyed.

One file in the user's cache folder holds an entry for each processor, instruction set and number of threads. A file
that cannot be believed is passed over with a warning: it only ever makes calls faster.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..accuracy import ACCURACIES
from ..errors import BackendError, CheckpointError
from .heuristics import CPU_THRESHOLDS, NO_CROSSING, Threshold

VARIABLE = "LUTGEMM_TUNED"
"""0: the built-in thresholds, whatever was measured."""

FORMAT = "lutgemm-tuned-cpu"
FORMAT_VERSION = 1
FILE_LIMIT = 1 << 20
"""Largest accepted file in bytes; an entry takes some 5000."""
MAX_ENTRIES = 64
MAX_ROWS = 256
REMEDY = "run `lutgemm tune` again, or delete the file"

KEY = ("cpu", "isa", "threads")
"""Fields that tell entries apart."""


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
        "max_tokens": None if row.max_tokens == NO_CROSSING else row.max_tokens,
        "max_tokens_bf16": None if row.max_tokens_bf16 == NO_CROSSING else row.max_tokens_bf16,
        "min_tokens": None if row.min_tokens == NO_CROSSING else row.min_tokens,
        "accuracy": row.accuracy,
    }


def where_measured(cpu: str, isa: str, threads: int, size: int) -> str:
    """The `device` of a `Threshold`."""
    return f"{cpu}, {isa}, {threads} thread{'s' * (threads != 1)}, N = K = {size}, group_size 128"


def cache_file() -> Path | None:
    """The file of tuned thresholds, there or not; None for a user without a home folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if base.startswith("/"):  # the XDG specification has others ignored
        return Path(base, "lutgemm", "tuned-cpu.json")
    try:
        return Path.home() / ".cache" / "lutgemm" / "tuned-cpu.json"
    except RuntimeError:
        return None


def switched_off() -> bool:
    """Whether `LUTGEMM_TUNED` says so. Raises `BackendError` for a value that says nothing."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise BackendError(f"{VARIABLE}={value!r} is unknown; use 0 (built-in thresholds), 1, or unset it")
    return value == "0"


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of the file, rows unchecked; none where there is no file. Raises `CheckpointError` for a bad file."""
    from ..checkpoint.json_file import read_json

    try:
        if not path.exists():
            return []
    except OSError:  # a folder of somebody else's
        return []
    found = read_json(path, FILE_LIMIT, REMEDY)
    head = (found.get("format"), found.get("version"))
    if head != (FORMAT, FORMAT_VERSION) or isinstance(head[1], (bool, float)):
        text = f"format {str(head[0])[:80]!r}, version {str(head[1])[:20]}"
        raise CheckpointError(
            f"{path}: is of {text}, this lutgemm reads {FORMAT!r}, version {FORMAT_VERSION}; {REMEDY}"
        )
    entries = found.get("entries")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path}: 'entries' is no list of objects; {REMEDY}")
    return entries


class _Unbelievable(ValueError):
    """What is wrong with an entry."""


def _text(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 200 or not value.isprintable():
        raise _Unbelievable(f"{name!r} is no short text")
    return value


def _count(entry: Mapping[str, Any], name: str, least: int) -> int:
    value = entry.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= NO_CROSSING:
        raise _Unbelievable(f"{name}={str(value)[:40]} is no number of at least {least}")
    return value


def _tokens(row: Mapping[str, Any], name: str) -> int:
    return NO_CROSSING if row.get(name, 0) is None else _count(row, name, 0)


def _row(row: Any, device: str, date: str) -> Threshold:
    from .cpu import BACKEND

    fields = set(row_to_json(CPU_THRESHOLDS[0]))
    if not isinstance(row, dict) or set(row) != fields:
        raise _Unbelievable(f"a row has other fields than {sorted(fields)}")
    op, algorithm, cost, integer = (row[name] for name in ("op", "algorithm", "max_cost", "integer_tables"))
    if not isinstance(op, str) or not isinstance(algorithm, str) or algorithm not in BACKEND.algorithms.get(op, ()):
        raise _Unbelievable(f"op {str(op)[:40]!r} has no algorithm {str(algorithm)[:40]!r}")
    if not isinstance(cost, (int, float)) or isinstance(cost, bool) or not 0 < cost < math.inf:
        raise _Unbelievable(f"max_cost={str(cost)[:40]} is no positive number")
    if not isinstance(integer, bool):
        raise _Unbelievable(f"integer_tables={str(integer)[:40]} is neither true nor false")
    if row["accuracy"] not in ("", *ACCURACIES):
        raise _Unbelievable(f"accuracy={str(row['accuracy'])[:40]} is unknown")
    tokens = (_tokens(row, "max_tokens"), _tokens(row, "max_tokens_bf16"))
    return Threshold(op, algorithm, cost, *tokens, integer, device, date, _tokens(row, "min_tokens"), row["accuracy"])


def entry_from_json(entry: Mapping[str, Any], path: Path) -> Entry:
    """The entry, every value checked. Raises `CheckpointError` naming the file and what is wrong."""
    try:
        cpu, isa, version, torch_version, date = (_text(entry, n) for n in ("cpu", "isa", "lutgemm", "torch", "date"))
        threads, size = _count(entry, "threads", 1), _count(entry, "size", 1)
        rows = entry.get("rows")
        if not isinstance(rows, list) or len(rows) > MAX_ROWS:
            raise _Unbelievable(f"'rows' is no list of at most {MAX_ROWS}")
        device = where_measured(cpu, isa, threads, size)
        checked = tuple(_row(row, device, date) for row in rows)
    except _Unbelievable as error:
        raise CheckpointError(f"{path}: {error}; {REMEDY}") from None
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


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    from ..checkpoint.atomic import write_file
    from ..checkpoint.json_file import dump_json

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, dump_json({"format": FORMAT, "version": FORMAT_VERSION, "entries": entries}))
    except (OSError, CheckpointError) as error:
        cause = error.__cause__ or error
        reason = cause.strerror if isinstance(cause, OSError) else cause
        remedy = "set XDG_CACHE_HOME to a folder with room that you may write to, or use --dry-run"
        raise CheckpointError(f"{path}: cannot be written: {reason}; {remedy}") from error


def save(path: Path, entry: Entry) -> None:
    """Put the entry into the file, in place of one for the same processor, instruction set and threads.

    A file that cannot be read is replaced. Raises `CheckpointError` when it cannot be written.
    """
    try:
        entries = read_entries(path)
    except CheckpointError:
        entries = []
    key = tuple(getattr(entry, name) for name in KEY)
    others = [old for old in entries if tuple(old.get(name) for name in KEY) != key]
    _write(path, [*others[-MAX_ENTRIES + 1 :], entry.to_json()])


def reset(path: Path, cpu: str, dry_run: bool = False) -> int:
    """Remove what was measured on this processor, and the file when nothing is left or it cannot be read.

    Returns how many entries went. dry_run: how many would. Raises `CheckpointError` when the file cannot be changed.
    """
    try:
        entries = read_entries(path)
        kept = [entry for entry in entries if entry.get("cpu") != cpu]
    except CheckpointError:
        entries, kept = [{}], []
    if not dry_run and len(kept) < len(entries):
        if kept:
            _write(path, kept)
        else:
            path.unlink(missing_ok=True)
    return len(entries) - len(kept)


@lru_cache(maxsize=1)
def _warn(reason: str) -> None:
    warnings.warn(f"tuned thresholds are not used: {reason}", RuntimeWarning, stacklevel=3)


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
        _warn(str(error))
        return CPU_THRESHOLDS
    if entry is None or entry.lutgemm != __version__:
        return CPU_THRESHOLDS
    measured = {(row.op, row.integer_tables) for row in entry.rows}
    return entry.rows + tuple(row for row in CPU_THRESHOLDS if (row.op, row.integer_tables) not in measured)


def forget() -> None:
    """Have the file and `LUTGEMM_TUNED` read again, and every choice made again."""
    from . import forget_choices

    rows.cache_clear()
    _warn.cache_clear()
    forget_choices()


def status(isa: str, threads: int) -> str:
    """One line on which thresholds are in use, and why."""
    from .. import __version__

    try:
        if switched_off():
            return f"built in ({VARIABLE}=0)"
        entry = find(isa, threads)
    except (BackendError, CheckpointError) as error:
        return f"built in: {error}"
    if entry is None:
        return f"built in; `lutgemm tune` measures this machine with {threads} thread{'s' * (threads != 1)}"
    if entry.lutgemm != __version__:
        return f"built in: those tuned on {entry.date} are for lutgemm {entry.lutgemm}; run `lutgemm tune` again"
    return f"tuned on {entry.date} with torch {entry.torch} ({cache_file()})"
