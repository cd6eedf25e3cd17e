"""The shared objects of the package: what each is made of, with which flags, or why it cannot be made here."""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import CompileError

from .toolchain import Machine, Torch, find_ninja, host_compiler

ROOT = Path(__file__).resolve().parent.parent
STABLE_ABI_TARGET = "0x020b000000000000"  # torch 2.11: one binary serves that release and all later ones
NVCC_FLAGS = ["-O3", "-std=c++17", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", "--compress-mode=size"]


@dataclass(frozen=True)
class Part:
    """One shared object: what it is made of, or why it cannot be made here."""

    name: str
    output: str
    """file name inside the package"""
    sources: tuple[str, ...] = ()
    """relative to the project's root"""
    flags: tuple[str, ...] = ()
    nvcc_flags: tuple[str, ...] = ()
    """of its .cu files"""
    links: tuple[str, ...] = ()
    missing: str | None = None


def arch_flags(archs: str) -> tuple[str, ...]:
    """nvcc's flags for a list such as "80+PTX;90a"; `CompileError` for one that says nothing."""
    flags = []
    for arch in filter(None, re.split(r"[;,\s]+", archs.replace(".", ""))):
        found = re.fullmatch(r"(\d{2,3}[af]?)(\+PTX)?", arch)
        if found is None or int(found[1].rstrip("af")) < 80:
            raise CompileError(
                f"LUTGEMM_CUDA_ARCHS={archs}: {arch!r} is no arch of 80 or later, such as 80, 90a, 80+PTX"
            )
        flags.append(f"-gencode=arch=compute_{found[1]},code=sm_{found[1]}")
        if found[2]:
            flags.append(f"-gencode=arch=compute_{found[1]},code=compute_{found[1]}")
    return tuple(flags)


def sources(*patterns: str) -> tuple[str, ...]:
    found = (path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern))
    return tuple(sorted(path.as_posix() for path in found))


def ops_part(machine: Machine) -> Part:
    files = sources("csrc/bind_cpu*.cpp", "csrc/cpu/*.cpp")
    if not any("bind_cpu" in file for file in files):
        return Part("_C", "_C.so", missing="csrc/bind_cpu.cpp is not in this source tree")
    if machine.torch is None:
        return Part("_C", "_C.so", missing=machine.no_torch)
    return Part("_C", "_C.so", files, binding_flags(machine.torch), links=torch_links(machine.torch))


def binding_flags(torch: Torch) -> tuple[str, ...]:
    """Of files with torch headers."""
    return (
        "-Icsrc",
        f"-isystem{torch.folder / 'include'}",
        # the error messages of inlined torch headers name their file: keep this machine's folders out of the binary
        f"-ffile-prefix-map={torch.folder.parent}=.",
        f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}",
    )


def torch_links(torch: Torch) -> tuple[str, ...]:
    """torch loads its libraries privately, so all three must stay NEEDED; where they lie is its affair: no rpath."""
    return (f"-L{torch.folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")


def cuda_part(mode: str, archs: str, machine: Machine) -> Part:
    def left_out(reason: str | None) -> Part:
        return Part("_C_cuda", "_C_cuda.so", missing=reason)

    files = sources("csrc/bind_cuda*.cpp", "csrc/cuda/*.cu")
    if not any("bind_cuda" in file for file in files):
        return left_out("csrc/bind_cuda.cpp is not in this source tree")
    if mode == "cpu":
        return left_out("LUTGEMM_BUILD=cpu was set when lutgemm was built; use auto or cuda")
    if machine.torch is None:
        return left_out(machine.no_torch)
    torch = machine.torch
    if mode == "auto" and torch.cuda is None:
        found = f"torch {torch.version}, for which lutgemm was built, has no CUDA"
        return left_out(f"{found}; install a CUDA build of torch and reinstall lutgemm, or set LUTGEMM_BUILD=cuda")
    if machine.nvcc is None:
        return left_out(machine.no_nvcc)
    return Part(
        "_C_cuda",
        "_C_cuda.so",
        files,
        # USE_CUDA: torch's headers then declare the way to its current stream
        (*binding_flags(torch), f"-isystem{machine.nvcc.home / 'include'}", "-DUSE_CUDA"),
        (*NVCC_FLAGS, f"-ccbin={host_compiler(machine.compiler or ['g++'])}", *arch_flags(archs)),
        # the static runtime: nothing to find at run time but the driver; its symbols stay inside
        (
            *torch_links(torch),
            "-Wl,--exclude-libs,ALL",
            *(f"-L{folder}" for name in ("lib64", "lib") if (folder := machine.nvcc.home / name).is_dir()),
            "-lcudart_static",
            "-lrt",
            "-ldl",
            "-lpthread",
        ),
    )


def host_part() -> Part:
    output = f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    files = sources("csrc/host_module.cpp", "csrc/host/*.cpp")
    if not files:
        return Part("_host", output, missing="csrc/host_module.cpp is not in this source tree")
    if not importlib.util.find_spec("pybind11"):
        return Part("_host", output, missing="pybind11 was not installed; pip install pybind11")
    python_headers = Path(sysconfig.get_path("include"))
    if not (python_headers / "Python.h").is_file():
        return Part("_host", output, missing=f"{python_headers} has no Python.h; install Python's development files")
    import pybind11

    return Part("_host", output, files, ("-Icsrc", f"-isystem{pybind11.get_include()}", f"-isystem{python_headers}"))


def plan(mode: str, archs: str, machine: Machine) -> list[Part]:
    """Every part of the package, each with its recipe or with the reason why it is left out."""
    parts = [ops_part(machine), cuda_part(mode, archs, machine), host_part()]
    reason = None
    if mode == "none":
        reason = "LUTGEMM_BUILD=none was set when lutgemm was built; unset it"
    elif not sys.platform.startswith("linux"):
        return [
            Part(p.name, p.output, missing=f"compiled parts exist for Linux, not for {sys.platform}") for p in parts
        ]
    elif machine.compiler is None:
        reason = machine.no_compiler
    elif find_ninja() is None:
        reason = "ninja was not found; pip install ninja"
    said = [part.missing is None or mode == "none" for part in parts]
    return [Part(p.name, p.output, missing=reason) if reason and new else p for p, new in zip(parts, said, strict=True)]
