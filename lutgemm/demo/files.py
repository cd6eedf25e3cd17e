"""Files and results of the demo that are either complete or not there, and reused when their settings are the same."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder: renamed to `path` on success, removed on failure.

    Raises `CheckpointError` when the disk is full or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        discard(temporary)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
            if file.is_file():
                _fsync(file)
        if temporary.is_dir():
            discard(path)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{path}: cannot be written: {reason}; free some space or use another --out") from error
    finally:
        if temporary.parent.is_dir():
            discard(temporary)


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write plain JSON values, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def settings_hash(settings: Any) -> str:
    """16 hex digits that change with any value in `settings` (plain JSON values)."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def code_digest(*patterns: str) -> str:
    """16 hex digits over this package's own files that the glob patterns match, relative to the package's folder.

    Part of a step's settings, so that a result made by other code is not reused.
    """
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in root.glob(pattern)}):
        digest.update(f"{file.relative_to(root)}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()[:16]


class Results:
    """The demo's finished steps, one JSON file each under `folder`: its settings, their hash, and its result."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.computed: list[str] = []
        self.reused: list[str] = []

    def get(self, name: str, settings: Any, compute: Callable[[], Any], needs: Path | None = None) -> Any:
        """The result of step `name`: the saved one if its settings are these and the path `needs` exists, else anew."""
        path, key = self.folder / f"{name}.json", settings_hash(settings)
        saved = _read_json(path)
        same = isinstance(saved, dict) and saved.get("key") == key and "result" in saved
        if same and (needs is None or needs.exists()):
            self.reused.append(name)
            return saved["result"]
        path.unlink(missing_ok=True)
        result = compute()
        write_json(path, {"key": key, "settings": settings, "result": result})
        self.computed.append(name)
        return result


def _read_json(path: Path) -> Any:
    """The JSON value in `path`, or None when it is absent or not JSON (a step that has to run again)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
