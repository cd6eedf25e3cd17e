"""The state of an unfinished conversion: what it was asked to do, from what, and which shards are finished."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..formats import FORMAT_VERSION
from .atomic import is_partial, write_error, write_file
from .json_file import INDEX_LIMIT, dump_json, read_json
from .plan import Options
from .reader import CheckpointFolder
from .records import LayerResult
from .safetensors_file import CHUNK

STATE_NAME = "lutgemm-state.json"
WORK_NAME = ".lutgemm-work"
STATE_VERSION = 1
RESTART = "delete the folder and start again without --resume"


def fingerprint(source: CheckpointFolder, options: Options, version: str) -> str:
    """One hash of everything that decides the bytes: the source, the options, the version of lutgemm."""
    facts = {
        "lutgemm": version,
        "format_version": FORMAT_VERSION,
        "options": options.to_dict(),
        "source": source.identity(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass
class FinishedShard:
    """A shard under its final name: size, sha256, and the results of its layers."""

    size: int
    sha256: str
    layers: list[LayerResult]


@dataclass
class State:
    """`lutgemm-state.json`: present in DST until everything is in place."""

    fingerprint: str
    options: Mapping[str, Any]
    shards: dict[str, FinishedShard] = field(default_factory=dict)

    def save(self, dst: Path) -> None:
        shards = {
            name: {"size": s.size, "sha256": s.sha256, "layers": [layer.to_dict() for layer in s.layers]}
            for name, s in self.shards.items()
        }
        entry = {
            "state_version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "options": dict(self.options),
            "shards": shards,
        }
        write_file(dst / STATE_NAME, dump_json(entry))

    @classmethod
    def load(cls, dst: Path) -> State | None:
        """The state in `dst`, None when there is none. Raises `CheckpointError` when it is damaged."""
        path = dst / STATE_NAME
        if not path.exists():
            return None
        entry = read_json(path, INDEX_LIMIT, RESTART)
        try:
            if entry["state_version"] != STATE_VERSION:
                raise CheckpointError(f"{path}: version {entry['state_version']!r} is unknown; {RESTART}")
            shards = {
                str(name): FinishedShard(
                    int(shard["size"]), str(shard["sha256"]), [LayerResult.from_dict(x) for x in shard["layers"]]
                )
                for name, shard in entry["shards"].items()
            }
            return cls(str(entry["fingerprint"]), dict(entry["options"]), shards)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error}); {RESTART}") from None


def is_whole(path: Path, shard: FinishedShard) -> bool:
    """Whether `path` still is the shard that was finished, by size and sha256."""
    if not path.is_file() or path.stat().st_size != shard.size:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == shard.sha256


def _is_leftover(path: Path) -> bool:
    """What an interrupted conversion may leave behind before its state file exists."""
    return path.name == WORK_NAME or is_partial(path)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in new if old.get(name) != new[name]]
    return f"different {', '.join(names)}" if names else "another or a changed SRC, or another version of lutgemm"


def open_destination(dst: Path, source: CheckpointFolder, options: Options, mark: str, resume: bool) -> State:
    """Make or take up DST; the state to go on from. Raises `CheckpointError` when DST must not be written."""
    if dst.exists() and source.folder.resolve() == dst.resolve():
        raise CheckpointError(f"{dst}: is SRC itself; choose another folder for the result")
    if dst.exists() and not dst.is_dir():
        raise CheckpointError(f"{dst}: is a file; choose a folder that does not exist yet")
    entries = sorted(dst.iterdir()) if dst.exists() else []
    state = State.load(dst)
    if state is None and any(not _is_leftover(entry) for entry in entries):
        raise CheckpointError(
            f"{dst}: is not empty (it holds {entries[-1].name!r}) and holds no unfinished conversion; "
            "choose another folder, or delete it first"
        )
    if entries and not resume:
        raise CheckpointError(
            f"{dst}: holds an unfinished conversion; continue it with --resume, or delete the folder to start again"
        )
    if state is not None and state.fingerprint != mark:
        why = _changed(state.options, options.to_dict())
        raise CheckpointError(f"{dst}: was begun with {why}; repeat that command with --resume, or delete the folder")
    try:
        (dst / WORK_NAME).mkdir(parents=True, exist_ok=True)
        if state is None:
            state = State(mark, options.to_dict())
            state.save(dst)
    except OSError as error:
        raise write_error(dst, error) from None
    return state


@contextmanager
def locked(dst: Path) -> Iterator[None]:
    """Hold the only right to write DST; released when the process ends, however it ends."""
    path = dst / WORK_NAME / "lock"
    try:
        handle = path.open("w")
    except OSError as error:
        raise write_error(path, error) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{dst}: another lutgemm process is writing it; wait until it has ended") from None
        yield
