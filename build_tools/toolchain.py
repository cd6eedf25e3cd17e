"""The compilers, torch, CUDA's toolkit and ninja that a build can use, or why it cannot. Nothing is imported or run for
longer than a compiler takes to tell its version."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 11)
OLDEST_CUDA = (12, 4)
LAUNCHERS = ("ccache", "sccache", "distcc")


@dataclass(frozen=True)
class Torch:
    folder: Path
    version: str
    cuda: str | None
    """the CUDA version that it was built for"""


@dataclass(frozen=True)
class Nvcc:
    command: str
    home: Path
    """of the toolkit: include/, lib64/"""
    version: str


@dataclass(frozen=True)
class Machine:
    """What is there, each with the reason where it is not."""

    compiler: list[str] | None
    no_compiler: str | None
    torch: Torch | None
    no_torch: str | None
    nvcc: Nvcc | None
    no_nvcc: str | None


def site_folders() -> list[Path]:
    """Where the target interpreter finds installed packages; under build isolation sys.path does not hold them all."""
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix, "pyvenv.cfg")
    isolated = config.is_file() and not re.search(r"system-site-packages\s*=\s*true", config.read_text("utf-8"), re.I)
    if not isolated:
        folders += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]


def find_torch() -> tuple[Torch | None, str | None]:
    """The installed torch, or why its headers cannot be used."""
    for folder in site_folders():
        version_file = folder / "torch" / "version.py"
        if not version_file.is_file():
            continue
        version = re.search(r"^__version__ = '([^']+)'", version_file.read_text("utf-8"), re.M)
        if version is None:
            return None, f"{version_file} states no version"
        numbers = tuple(int(number) for number in re.findall(r"\d+", version[1])[:2])
        if numbers < OLDEST_TORCH:
            return None, f"torch {version[1]} is older than {'.'.join(map(str, OLDEST_TORCH))}; upgrade torch"
        if not (folder / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
            return None, f"torch {version[1]} in {folder} has no C++ headers"
        cuda = re.search(r"^cuda\b[^=\n]*= *'([^']+)'", version_file.read_text("utf-8"), re.M)
        return Torch(folder / "torch", version[1], cuda[1] if cuda else None), None
    where = sysconfig.get_path("purelib")
    return None, f"torch was not in {where} at build time; install torch, then this package with --no-build-isolation"


def find_compiler() -> tuple[list[str] | None, str | None]:
    """The C++ compiler's command (it may have a launcher before it, as in CXX="ccache g++"), or why there is none."""
    if asked := os.environ.get("CXX"):
        command = shlex.split(asked)
        return (command, None) if shutil.which(command[0]) else (None, f"CXX={asked} is not to be found")
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name], None
    return None, "no C++ compiler (g++, clang++, c++) was on PATH when lutgemm was built; install one, then reinstall"


def find_nvcc() -> tuple[Nvcc | None, str | None]:
    """CUDA's compiler, or why it cannot be used. Its toolkit is what it says itself: on PATH it may be a wrapper."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home, "bin")) for home in homes] or [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    command = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if command is None:
        where = f"in {' or '.join(places)}" if homes else "on PATH or in /usr/local/cuda"
        return None, f"nvcc was not {where} when lutgemm was built; install the CUDA toolkit, then reinstall"
    asked = subprocess.run([command, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    told = re.search(r"^#\$ TOP=(.+)$", asked.stderr, re.M)
    home = Path(told[1].strip()).resolve() if told else Path(command).resolve().parent.parent
    release = re.search(r"release (\d+\.\d+)", compiler_version([command], "release"))
    if release is None:
        return None, f"{command} does not tell its version"
    if tuple(map(int, release[1].split("."))) < OLDEST_CUDA:
        return None, f"{command} is of CUDA {release[1]}, older than {'.'.join(map(str, OLDEST_CUDA))}; upgrade it"
    if not (home / "include" / "cuda_runtime_api.h").is_file():
        return None, f"{home} has no include/cuda_runtime_api.h; install CUDA's runtime headers"
    return Nvcc(command, home, release[1]), None


def find_ninja() -> str | None:
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    return shutil.which("ninja")


def compiler_version(compiler: list[str], word: str = "") -> str:
    """The first line of what it says of its version, that has the word in it."""
    run = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return next((line for line in (run.stdout or run.stderr).splitlines() if word in line), "").strip()


def host_compiler(compiler: list[str]) -> str:
    """The compiler itself, for nvcc: without a launcher before it."""
    return compiler[1] if len(compiler) > 1 and Path(compiler[0]).name in LAUNCHERS else compiler[0]
