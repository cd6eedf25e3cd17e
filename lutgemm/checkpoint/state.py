"""The state of an unfinished conversion: what it was asked to do, from what, and which shards are finished."""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import CheckpointError
from ..formats import FORMAT_VERSION
from .atomic import is_partial, write_error, write_file
from .json_file import INDEX_LIMIT, dump_json, read_json
from .plan import Options
from .reader import STATE_NAME, CheckpointFolder
from .records import LayerResult
from .safetensors_file import CHUNK

WORK_NAME = ".lutgemm-work"
STATE_VERSION = 2
RESTART = "delete the folder and start again without --resume"

REMEDIES = {
    "lutgemm": "install lutgemm {}",
    "torch": "install torch {}",
    "instruction set": "go back to a machine with {}, or set ATEN_CPU_CAPABILITY,",
    "GPU": "go back to a machine with {}",
    "threads": "give --threads {}",
}
"""What `environment` tells -> how to have it as it was."""


def fingerprint(source: CheckpointFolder, options: Options) -> str:
    """One hash of what is asked for: the source, the options, the version of the format."""
    facts = {"format_version": FORMAT_VERSION, "options": options.to_dict(), "source": source.identity()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def environment(options: Options) -> dict[str, str]:
    """What else decides the bytes: versions, and the instruction set that torch has chosen its kernels for, because
    sums are added up in another order with another vector length.

    BCQ holds torch to one thread and adds up each group on its own, so the number of threads plays no part. k-means of
    codebooks runs on all threads, and a sum over all vectors depends on how many share it.
    """
    facts = {
        "lutgemm": __version__,
        "torch": torch.__version__,
        "instruction set": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
    if options.device.startswith("cuda"):
        facts["GPU"] = torch.cuda.get_device_name(options.device)
    elif any(config.format == "codebook" for config in options.all_configs()):
        facts["threads"] = str(torch.get_num_threads())
    return facts


@dataclass
class FinishedShard:
    """A shard under its final name: size, sha256, and the results of its layers."""

    size: int
    sha256: str
    layers: list[LayerResult]

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> FinishedShard:
        """Raises `ValueError` or `CheckpointError` when a value makes no sense, `KeyError` when one is missing."""
        size, sha256 = entry["size"], entry["sha256"]
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"size {size!r} is not a number of bytes")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError("sha256 is not 64 hexadecimal digits")
        if not isinstance(entry["layers"], list):
            raise ValueError("layers is not a list")
        return cls(size, sha256, [LayerResult.from_dict(layer) for layer in entry["layers"]])


@dataclass
class State:
    """`lutgemm-state.json`: present in DST until everything is in place."""

    fingerprint: str
    options: Mapping[str, Any]
    environment: Mapping[str, str]
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
            "environment": dict(self.environment),
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
        where = ""
        try:
            if entry["state_version"] != STATE_VERSION:
                raise ValueError(
                    f"state_version {entry['state_version']!r} is unknown, this lutgemm has {STATE_VERSION}"
                )
            shards = {}
            for name, shard in entry["shards"].items():
                where = f"shard {name[:200]!r}: "
                shards[name] = FinishedShard.from_dict(shard)
            where = ""
            facts = {str(name): str(value) for name, value in entry["environment"].items()}
            return cls(str(entry["fingerprint"]), dict(entry["options"]), facts, shards)
        except KeyError as error:
            raise CheckpointError(f"{path}: damaged ({where}{error} is missing); {RESTART}") from None
        except (CheckpointError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged ({where}{error}); {RESTART}") from None


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


def _check_same(dst: Path, state: State, options: Options, mark: str, facts: Mapping[str, str]) -> None:
    """Raise `CheckpointError` when going on with `state` could give other bytes than an undisturbed run."""
    if state.fingerprint != mark:
        asked = options.to_dict()
        names = [name for name in asked if state.options.get(name) != asked[name]]
        why = f"different {', '.join(names)}" if names else "another or a changed SRC"
        raise CheckpointError(f"{dst}: was begun with {why}; repeat that command with --resume, or delete the folder")
    for name, remedy in REMEDIES.items():
        old, new = state.environment.get(name, "none"), facts.get(name, "none")
        if old != new:
            raise CheckpointError(
                f"{dst}: was begun with {name} {old}, now {name} is {new}, which can change the result; "
                f"{remedy.format(old)} and repeat the command with --resume, or delete the folder to start again"
            )


def open_destination(dst: Path, source: CheckpointFolder, options: Options, mark: str, resume: bool) -> State:
    """Make or take up DST; the state to go on from. Raises `CheckpointError` when DST must not be written."""
    if dst.exists() and source.folder.resolve() == dst.resolve():
        raise CheckpointError(f"{dst}: is SRC itself; choose another folder for the result")
    if dst.exists() and not dst.is_dir():
        raise CheckpointError(f"{dst}: is a file; choose a folder that does not exist yet")
    entries = sorted(dst.iterdir()) if dst.exists() else []
    facts = environment(options)
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
    if state is not None:
        _check_same(dst, state, options, mark, facts)
    try:
        (dst / WORK_NAME).mkdir(parents=True, exist_ok=True)
        if state is None:
            state = State(mark, options.to_dict(), facts)
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
