"""`lutgemm env`: what this installation is made of, which backends run here, and why the others do not."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _native
from ..backends import backends, cpu, triton, tuned, tuned_gpu
from ..testing.hardware import cpu_caches, cpu_flags, cpu_name, usable_cores
from ..testing.targets import isa_in_use

NAME = "env"
HELP = "show versions, backends and why one is missing"

PACKAGES = ("transformers", "safetensors", "triton", "numpy", "accelerate", "gguf", "matplotlib", "tqdm")
CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512vbmi",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "asimddp",
)
"""Processor features that kernels use or may use."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lutgemm env`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _build_info() -> dict[str, Any]:
    """What setup.py recorded when this copy was built, or nothing."""
    path = Path(_native.__file__).parent / "_build_info.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _triton_sizes() -> str | None:
    """Where the block sizes of Triton's kernels are from; None where these cannot run."""
    if triton.BACKEND.unavailable() is not None:
        return None
    from ..kernels import tuned as of_triton

    return of_triton.status(of_triton.device_name(torch.cuda.current_device()))


def collect() -> dict[str, Any]:
    """Everything that `lutgemm env` shows, as JSON values. A reason is null where a thing is present."""
    flags = cpu_flags()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "lutgemm": __version__,
        "path": str(Path(_native.__file__).parent),
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {package: _version(package) for package in PACKAGES},
        "cpu": {
            "name": cpu_name(),
            "cores": usable_cores(),
            "caches": cpu_caches(),
            "flags": [flag for flag in CPU_FLAGS if flag in flags],
            "threads": torch.get_num_threads(),
            "isas": list(cpu.available_isas()),
            "isa_in_use": isa_in_use() or None,
            "isa_variable": os.environ.get(cpu.ISA_VARIABLE),
            "thresholds": tuned.status(isa_in_use(), torch.get_num_threads()),
        },
        "gpus": gpus,
        "gpu_thresholds": tuned_gpu.status() if gpus else None,
        "triton_sizes": _triton_sizes() if gpus else None,
        "backends": backends(),
        "compiled": {"_C": _native.load_ops("_C"), "_C_cuda": _native.load_ops("_C_cuda"), "_host": _native.host()[1]},
        "build": _build_info(),
    }


def _lines(found: dict[str, Any]) -> list[str]:
    cpu_found = found["cpu"]
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in cpu_found["caches"].items())
    lines = [
        f"lutgemm      {found['lutgemm']} in {found['path']}",
        f"python       {found['python']} on {found['system']}",
        f"torch        {found['torch']}"
        + (f", CUDA {found['torch_cuda']}" if found["torch_cuda"] else ", without CUDA"),
    ]
    lines += [f"{name:<12} {version or 'not installed'}" for name, version in found["packages"].items()]
    lines += [
        f"cpu          {cpu_found['name']}, {cpu_found['cores']} cores" + (f", {caches}" if caches else ""),
        f"             {' '.join(cpu_found['flags'])}",
        f"threads      {cpu_found['threads']} (torch.set_num_threads)",
        f"thresholds   {cpu_found['thresholds']}",
        f"gpu          {', '.join(found['gpus']) or 'none that torch sees'}",
    ]
    if found["gpu_thresholds"]:
        lines.append(f"thresholds   {found['gpu_thresholds']}")
    if found["triton_sizes"]:
        lines.append(f"block sizes  {found['triton_sizes']} (triton)")
    lines += ["", "backends"]
    for name, reason in found["backends"].items():
        detail = ""
        if name == cpu.BACKEND.name and reason is None:
            detail = f", kernels for {cpu_found['isa_in_use']} (built: {', '.join(cpu_found['isas'])})"
        lines.append(f"  {name:<10} {'available' + detail if reason is None else 'NOT available: ' + reason}")
    lines.append("compiled parts")
    for name, reason in found["compiled"].items():
        lines.append(f"  {name:<10} {'loaded' if reason is None else 'absent: ' + reason}")
    if compiler := found["build"].get("compiler"):
        nvcc, archs = found["build"].get("nvcc"), found["build"].get("cuda_archs")
        lines.append(f"  built with {compiler}" + (f", nvcc {nvcc} for {archs}" if nvcc else ""))
    return lines


def run(args: argparse.Namespace) -> int:
    """Print it. Works with nothing compiled."""
    found = collect()
    sys.stdout.write((json.dumps(found, indent=1) if args.json else "\n".join(_lines(found))) + "\n")
    return 0
