"""Builds CUDA sources as host code under csrc/emulation into a shared object, each object file cached by content.

    build("lutgemm_test", [ROOT / "tests" / "emulation" / "faults.cu"]) -> Path of the .so

`.cu` files are compiled with the hooks that report each memory access; other sources (bindings) without. The emulator's
own sources are always part. Load the result with ctypes (`control`) or torch.ops.load_library.
"""

from __future__ import annotations

import ctypes
import fcntl
import getpass
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "csrc" / "emulation"
COMMON: tuple[str, ...] = ("-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DLUTGEMM_EMULATED")
COMMON += ("-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}")
# What -fsanitize=thread calls is csrc/emulation/hooks.cpp: the sanitizer's own library is not linked.
HOOKED = ("-x", "c++", "-O1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")
PLAIN = ("-O2",)


def compiler() -> str | None:
    """g++ (clang++ instruments otherwise), or None where there is none."""
    return (
        shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0])
        if "clang" not in os.environ.get("CXX", "")
        else (shutil.which("g++"))
    )


def cache_folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"lutgemm-emulated-{getpass.getuser()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:32]


def dependencies(depfile: Path) -> list[Path]:
    """The files that a compilation read, from its Makefile rule."""
    words = shlex.split(depfile.read_text("utf-8").replace("\\\n", " "))
    return [Path(word) for word in words[1:] if not word.startswith("/usr/")]


def fingerprint(files: Sequence[Path]) -> str | None:
    """Of the names and contents; None when a file is gone."""
    if not all(file.is_file() for file in files):
        return None
    return digest(*(part for file in files for part in (str(file).encode(), file.read_bytes())))


def compile_one(command: list[str], source: Path, folder: Path) -> Path:
    """The object file of `source`, recompiled when it, a header it includes or the command changed."""
    key = digest(*(word.encode() for word in [*command, str(source)]))
    record = folder / f"{key}.json"
    if record.is_file():
        known = json.loads(record.read_text("utf-8"))
        stored = folder / known["object"]
        if stored.is_file() and fingerprint([Path(name) for name in known["files"]]) == known["fingerprint"]:
            return stored
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made, depfile = Path(temporary, "object.o"), Path(temporary, "object.d")
        run = subprocess.run(
            [*command, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(made)],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise RuntimeError(f"{shlex.join(command)} -c {source} failed:\n{run.stderr[-8000:]}")
        files = dependencies(depfile)
        print_of_files = fingerprint(files)
        stored = folder / f"{digest(key.encode(), str(print_of_files).encode())}.o"
        made.replace(stored)
    text = json.dumps({"object": stored.name, "files": [str(file) for file in files], "fingerprint": print_of_files})
    partial = record.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(record)
    return stored


def build(
    name: str, sources: Sequence[Path], flags: Sequence[str] = (), links: Sequence[str] = (), jobs: int = 2
) -> Path:
    """The shared object `name` of `sources` and the emulator. `flags` go to every compilation, `links` to the linker.

    Raises RuntimeError with the compiler's words when something does not compile, or without a g++.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no g++ on PATH: install one to run CUDA kernels on the host")
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout.partition("\n")[0]
    folder = cache_folder()
    every = [*sorted(EMULATOR.glob("*.cpp")), *sources]

    def compile_source(source: Path) -> Path:
        mode = HOOKED if source.suffix == ".cu" else PLAIN
        return compile_one([cxx, *COMMON, *mode, *flags], source, folder)

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compile_source, every))
        output = (
            folder
            / f"{name}-{digest(version.encode(), *(p.name.encode() for p in objects), *map(str.encode, links))}.so"
        )
        if not output.is_file():
            partial = output.with_suffix(".partial")
            command = [cxx, "-shared", "-Wl,-Bsymbolic,-z,defs", *map(str, objects), *links, "-ldl", "-o", str(partial)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise RuntimeError(f"{shlex.join(command)} failed:\n{run.stderr[-8000:]}")
            partial.replace(output)
    return output


class Control:
    """The emulator inside a shared object made by `build`: its switches and its counts (csrc/emulation/control.h)."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulation_set.argtypes = [ctypes.c_char_p, ctypes.c_long]
        self.library.emulation_set.restype = ctypes.c_bool
        self.library.emulation_report.restype = ctypes.c_char_p

    def set(self, **values: int) -> None:
        """checks, races, counts, seed, sm_count, architecture."""
        for name, value in values.items():
            if not self.library.emulation_set(name.encode(), value):
                raise ValueError(f"the emulator has no option {name!r}")

    def reset_counts(self) -> None:
        self.library.emulation_reset_counts()

    def report(self) -> list[dict]:
        return json.loads(self.library.emulation_report())
