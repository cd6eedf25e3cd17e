"""Files that appear whole or not at all: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError

_REMEDIES = {
    errno.ENOSPC: "free some disk space, then run the same command with --resume",
    errno.EDQUOT: "free some of your disk quota, then run the same command with --resume",
    errno.EFBIG: "raise the file size limit (ulimit -f), then run the same command with --resume",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
}


def write_error(path: Path, error: OSError) -> CheckpointError:
    """The error to raise when writing `path` failed: what, why, and the remedy."""
    remedy = _REMEDIES.get(error.errno or 0, "check the disk and the path, then run the same command with --resume")
    return CheckpointError(f"{path}: cannot be written: {error.strerror or error}; {remedy}")


def partial_path(path: Path) -> Path:
    """The temporary name beside `path` that it is written under."""
    return path.with_name(f".{path.name}.partial")


def is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well, and is removed when it does not.

    Raises `CheckpointError` when the disk is full or the folder cannot be written.
    """
    temporary = partial_path(path)
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_writer(path) as handle:
        handle.write(data)
