"""The files in which `lutgemm tune` keeps what it measured, one for each kind of device, in the user's cache folder.

A file holds entries, one for each machine; fields of its key tell them apart. A file that cannot be believed is passed
over with a warning: it only ever makes calls faster.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from ..errors import BackendError, CheckpointError
from .heuristics import NO_CROSSING

VARIABLE = "LUTGEMM_TUNED"
"""0: the built-in thresholds, whatever was measured."""

FILE_LIMIT = 1 << 20
"""Largest accepted file in bytes; an entry takes some 5000 of a CPU, 50000 of a GPU."""
MAX_ENTRIES = 64


def switched_off() -> bool:
    """Whether `LUTGEMM_TUNED` says so. Raises `BackendError` for a value that says nothing."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise BackendError(f"{VARIABLE}={value!r} is unknown; use 0 (built-in thresholds), 1, or unset it")
    return value == "0"


@dataclass(frozen=True)
class TunedFile:
    """One of the files: what it is called, what it says of itself, and how it is read and changed."""

    name: str
    format: str
    version: int
    key: tuple[str, ...]
    """Fields that tell entries apart."""
    command: str
    """What writes it."""

    @property
    def remedy(self) -> str:
        """What to do about a bad file."""
        return f"run `{self.command}` again, or delete the file"

    def path(self) -> Path | None:
        """Where it is, there or not; None for a user without a home folder."""
        base = os.environ.get("XDG_CACHE_HOME", "")
        if base.startswith("/"):  # the XDG specification has others ignored
            return Path(base, "lutgemm", self.name)
        try:
            return Path.home() / ".cache" / "lutgemm" / self.name
        except RuntimeError:
            return None

    def read(self, path: Path) -> list[dict[str, Any]]:
        """The entries, their fields unchecked; none where there is no file. Raises `CheckpointError` for a bad file."""
        from ..checkpoint.json_file import read_json

        try:
            if not path.exists():
                return []
        except OSError:  # a folder of somebody else's
            return []
        found = read_json(path, FILE_LIMIT, self.remedy)
        head = (found.get("format"), found.get("version"))
        if head != (self.format, self.version) or isinstance(head[1], (bool, float)):
            text = f"format {str(head[0])[:80]!r}, version {str(head[1])[:20]}"
            expected = f"{self.format!r}, version {self.version}"
            raise CheckpointError(f"{path}: is of {text}, this lutgemm reads {expected}; {self.remedy}")
        entries = found.get("entries")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise CheckpointError(f"{path}: 'entries' is no list of objects; {self.remedy}")
        return entries

    def _write(self, path: Path, entries: list[dict[str, Any]]) -> None:
        from ..checkpoint.atomic import write_file
        from ..checkpoint.json_file import dump_json

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, dump_json({"format": self.format, "version": self.version, "entries": entries}))
        except (OSError, CheckpointError) as error:
            cause = error.__cause__ or error
            reason = cause.strerror if isinstance(cause, OSError) else cause
            remedy = "set XDG_CACHE_HOME to a folder with room that you may write to, or use --dry-run"
            raise CheckpointError(f"{path}: cannot be written: {reason}; {remedy}") from error

    def save(self, path: Path, entry: Mapping[str, Any]) -> None:
        """Put the entry (JSON values) into the file, in place of one of the same key.

        A file that cannot be read is replaced. Raises `CheckpointError` when it cannot be written.
        """
        try:
            entries = self.read(path)
        except CheckpointError:
            entries = []
        key = [entry[name] for name in self.key]
        others = [old for old in entries if [old.get(name) for name in self.key] != key]
        self._write(path, [*others[-MAX_ENTRIES + 1 :], dict(entry)])

    def reset(self, path: Path, ours: Callable[[dict[str, Any]], bool], dry_run: bool = False) -> int:
        """Remove the entries that are `ours`, and the file when nothing is left or it cannot be read.

        Returns how many entries went. dry_run: how many would. Raises `CheckpointError` when the file cannot be
        changed.
        """
        try:
            entries = self.read(path)
            kept = [entry for entry in entries if not ours(entry)]
        except CheckpointError:
            entries, kept = [{}], []
        if not dry_run and len(kept) < len(entries):
            if kept:
                self._write(path, kept)
            else:
                path.unlink(missing_ok=True)
        return len(entries) - len(kept)


class Unbelievable(ValueError):
    """What is wrong with an entry."""


def read_text(entry: Mapping[str, Any], name: str) -> str:
    """The field, a short printable text."""
    value = entry.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 200 or not value.isprintable():
        raise Unbelievable(f"{name!r} is no short text")
    return value


def read_count(entry: Mapping[str, Any], name: str, least: int) -> int:
    """The field, a whole number of at least `least`."""
    value = entry.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= NO_CROSSING:
        raise Unbelievable(f"{name}={str(value)[:40]} is no number of at least {least}")
    return value


def read_tokens(row: Mapping[str, Any], name: str) -> int:
    """The field, a number of tokens; null stands for `NO_CROSSING`."""
    return NO_CROSSING if row.get(name, 0) is None else read_count(row, name, 0)


def shown_tokens(tokens: int) -> int | None:
    """A number of tokens as JSON: null for `NO_CROSSING`."""
    return None if tokens == NO_CROSSING else tokens


@lru_cache(maxsize=8)
def warn(reason: str) -> None:
    """Say, once, that a file is passed over."""
    warnings.warn(f"tuned thresholds are not used: {reason}", RuntimeWarning, stacklevel=3)


class Measured(Protocol):
    """What every entry tells."""

    @property
    def lutgemm(self) -> str: ...
    @property
    def torch(self) -> str: ...
    @property
    def date(self) -> str: ...


def status(file: TunedFile, find: Callable[[], Measured | None], hint: str) -> str:
    """One line on which thresholds are in use, and why. hint: what to say where nothing was measured."""
    from .. import __version__

    try:
        if switched_off():
            return f"built in ({VARIABLE}=0)"
        entry = find()
    except (BackendError, CheckpointError) as error:
        return f"built in: {error}"
    if entry is None:
        return f"built in; {hint}"
    if entry.lutgemm != __version__:
        return f"built in: those tuned on {entry.date} are for lutgemm {entry.lutgemm}; run `{file.command}` again"
    return f"tuned on {entry.date} with torch {entry.torch} ({file.path()})"
