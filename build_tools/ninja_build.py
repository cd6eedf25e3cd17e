"""Compiling: the build graph for ninja, and running it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from .parts import ROOT, Part
from .toolchain import find_ninja

OBJECTS = Path("build", f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}")
# No contraction: a*b+c rounds alike in the scalar and in the vector kernels unless a kernel asks for an FMA by name.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
# gcc calls the deliberately undefined registers of its own AVX-512 headers uninitialized; clang does not know the flag.
CXX_FLAGS += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]


def ninja_text(text: str) -> str:
    return text.replace("$", "$$")


def ninja_path(path: str | Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(parts: list[Part], compiler: list[str], nvcc: str) -> str:
    """The build graph. ninja recompiles a file whose text, included headers or command line changed."""
    cxx = ninja_text(shlex.join(compiler))
    extra = ninja_text(os.environ.get("CXXFLAGS", ""))
    extra_cuda = ninja_text(os.environ.get("NVCCFLAGS", ""))
    extra_link = ninja_text(os.environ.get("LDFLAGS", ""))
    lines = [
        f"builddir = {ninja_path(OBJECTS)}",
        "rule compile",
        f"  command = {cxx} -MMD -MF $out.d $flags {extra} -c $in -o $out",
        "  description = c++ $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {ninja_text(shlex.quote(nvcc))} -MMD -MF $out.d $flags {extra_cuda} -c $in -o $out",
        "  description = nvcc $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -shared $in -o $out $links {extra_link}",
        "  description = link $out",
    ]
    for part in parts:
        objects = [ninja_path(OBJECTS / part.name / f"{file}.o") for file in part.sources]
        flags = ninja_text(shlex.join([*CXX_FLAGS, *part.flags]))
        nvcc_flags = ninja_text(shlex.join(part.nvcc_flags))
        for file, target in zip(part.sources, objects, strict=True):
            rule, its_flags = ("nvcc", nvcc_flags) if file.endswith(".cu") else ("compile", flags)
            lines += [f"build {target}: {rule} {ninja_path(file)}", f"  flags = {its_flags}"]
        lines += [f"build {ninja_path(OBJECTS / part.output)}: link {' '.join(objects)}"]
        lines += [f"  links = {ninja_text(shlex.join(part.links))}"]
    return "\n".join(lines) + "\n"


def run_ninja(targets: list[str]) -> str | None:
    """None when all targets are up to date, else the first line that reports an error. The output passes through."""
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [str(find_ninja()), "-f", str(OBJECTS / "build.ninja"), "-k", "0", *jobs, *targets]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line.strip())
    if process.wait() == 0:
        return None
    telling = [line for line in lines if "error:" in line or "undefined reference" in line] or lines[-1:]
    return telling[0][:300] if telling else f"ninja ended with status {process.returncode}"


def compile_parts(parts: list[Part], compiler: list[str], nvcc: str) -> dict[str, str]:
    """Brings the shared objects in `OBJECTS` up to date. Returns name -> error of those that fail."""
    import fcntl  # exists on POSIX only, as do the compiled parts

    folder = ROOT / OBJECTS
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(ninja_file(parts, compiler, nvcc), "utf-8")
        if run_ninja([str(OBJECTS / part.output) for part in parts]) is None:
            return {}
        errors = {part.name: run_ninja([str(OBJECTS / part.output)]) for part in parts}
    return {name: f"compiling failed: {error}" for name, error in errors.items() if error}
