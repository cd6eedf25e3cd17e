"""Builds CUDA sources as host code under csrc/emulation into a shared object, each object file cached by content.

    build("lutgemm_test", [ROOT / "tests" / "emulation" / "faults.cu"]) -> Path of the .so

`.cu` files are compiled with the hooks that report each memory access; other sources (bindings) without. The emulator's
own sources are always part. Load the result with ctypes (`control`) or torch.ops.load_library.
"""

from __future__ import annotations

import contextlib
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
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "csrc" / "emulation"
COMMON = (
    *("-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DLUTGEMM_EMULATED"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"),
)
# What the sanitizers' code calls is csrc/emulation/memory.cpp and undefined.cpp: their own libraries are not linked.
HOOKED = (
    *("-x", "c++", "-Og", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
    "-fsanitize=bounds,signed-integer-overflow,shift-exponent,integer-divide-by-zero",
)
"""-Og compiles in half the time of -O1, and costs a tenth more when the kernels run: the hooks take most of that."""
EMULATOR_FLAGS, PLAIN = ("-O2",), ("-Og",)


def compiler() -> str | None:
    """The command of g++, or None where there is none. (clang++ reports fewer accesses to the hooks.)"""
    return shutil.which(os.environ.get("LUTGEMM_EMULATOR_CXX", "g++"))


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


def compile_one(command: list[str], version: str, source: Path, folder: Path) -> Path:
    """The object file of `source`, recompiled when it, a header it includes, the command or the compiler changed."""
    key = digest(*(word.encode() for word in [version, *command, str(source)]))
    record = folder / f"{key}.json"
    if record.is_file():
        known = json.loads(record.read_text("utf-8"))
        stored = folder / known["object"]
        if stored.is_file() and fingerprint([Path(name) for name in known["files"]]) == known["fingerprint"]:
            os.utime(stored)
            os.utime(record)
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
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as partial:
        partial.write(text)
    Path(partial.name).replace(record)
    return stored


def drop_unused(folder: Path) -> None:
    """Forgets what no build has used for a week."""
    for file in folder.glob("*.*"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if file.is_file() and file.stat().st_mtime < time.time() - 7 * 86400:
                file.unlink()


def build(
    name: str, sources: Sequence[Path], flags: Sequence[str] = (), links: Sequence[str] = (), jobs: int = 2
) -> Path:
    """The shared object `name` of `sources` and the emulator. `flags` go to the sources, `links` to the linker.

    Raises RuntimeError with the compiler's words when something does not compile, or without a g++.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no g++ on PATH: install one to run CUDA kernels on the host")
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout.partition("\n")[0]
    folder = cache_folder()
    drop_unused(folder)
    emulator = [(source, (*COMMON, *EMULATOR_FLAGS)) for source in sorted(EMULATOR.glob("*.cpp"))]
    own = [(source, (*COMMON, *(HOOKED if source.suffix == ".cu" else PLAIN), *flags)) for source in sources]

    # The emulator goes first: of a template that two objects have, the linker takes the first, and the emulator's own
    # must be the one without hooks.
    jobs_in_order = [*emulator, *own]

    def compile_source(job: tuple[Path, tuple[str, ...]]) -> Path:
        return compile_one([cxx, *job[1]], version, job[0], folder)

    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(jobs) as pool:
            largest_first = sorted(jobs_in_order, key=lambda job: -job[0].stat().st_size)  # often the slowest
            made_of = dict(zip(largest_first, pool.map(compile_source, largest_first), strict=True))
        objects = [made_of[job] for job in jobs_in_order]
        output = folder / f"{name}-{digest(*(part.encode() for part in [version, *map(str, objects), *links]))}.so"
        if output.is_file():
            os.utime(output)
            return output
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary, "library.so")
            command = [cxx, "-shared", "-Wl,-Bsymbolic,-z,defs", *map(str, objects), *links, "-ldl", "-o", str(made)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise RuntimeError(f"{shlex.join(command)} failed:\n{run.stderr[-8000:]}")
            made.replace(output)
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
