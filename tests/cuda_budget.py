"""What nvcc makes of every kernel: registers, spills, stack, shared memory, instructions; and the budget of all that.

    python tests/cuda_budget.py [lut_gemm.cu ...]             show what the kernels use, and what is over budget
    python tests/cuda_budget.py --update [lut_gemm.cu ...]    write it to csrc/cuda/budget.json

budget.json: source -> kernel -> {"sass": instructions that it must contain, on every architecture, and
arch: {"registers": most, "shared": most bytes of static shared memory, "sass": the same for this architecture}}.
An update leaves "sass" as it is. Registers are rounded up to 8, by which the hardware hands them out. Spills, stack,
local memory and atomics on global memory are allowed to none.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import sass_products

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BUDGET = ROOT / "csrc" / "cuda" / "budget.json"
CACHE = ROOT / "build" / "cubin"
ARCHS = ("80", "90a")
"""What a source is compiled for, beside PTX."""
REGISTER_UNIT = 8

Kernels = dict[str, dict[str, "Kernel"]]
"""arch -> kernel -> what it uses"""

NEVER = {
    "LDL": "local memory is read",
    "STL": "local memory is written",
    "RED": "global memory is changed by a reduction: its order is not fixed",
    "ATOMG": "global memory is changed by an atomic operation: its order is not fixed",
}
"""Instruction -> what is wrong with it."""


@dataclass
class Kernel:
    """One kernel for one architecture."""

    registers: int = 0
    shared: int = 0
    spills: int = 0
    stack: int = 0
    sass: list[str] = field(default_factory=list)
    """names of its instructions with their modifiers; empty where there is no disassembler"""


@cache
def build() -> dict[str, Any]:
    """setup.py's names, with the GPU part planned whatever torch is: how the package is built is stated there."""
    settings = {name: os.environ.pop(name, None) for name in ("LUTGEMM_BUILD", "LUTGEMM_CUDA_ARCHS")}
    os.environ["LUTGEMM_BUILD"] = "cuda"
    try:
        return runpy.run_path(str(ROOT / "setup.py"), run_name="setup_of_lutgemm")
    finally:
        del os.environ["LUTGEMM_BUILD"]
        os.environ.update({name: value for name, value in settings.items() if value is not None})


@cache
def part() -> Any:
    """The recipe of _C_cuda."""
    return next(part for part in build()["PARTS"] if part.name == "_C_cuda")


@cache
def nvcc() -> tuple[str, str | None]:
    """(nvcc, None), or ("", why there is none)."""
    found, reason = build()["NVCC"], build()["NO_NVCC"]
    return (found.command, None) if found else ("", reason)


@cache
def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: on PATH, in the toolkit, or in a package that brings it."""
    found = build()["NVCC"]
    folders = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p]
    folders += [found.home / "bin"] if found else []
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        spec = importlib.util.find_spec(package)
        folders += [Path(place, inside) for place in (spec.submodule_search_locations or ())] if spec else []
    return next((str(folder / name) for folder in folders if os.access(folder / name, os.X_OK)), None)


def kernel_name(demangled: str) -> str:
    """`void a::b::gather<(int)4, a::Half>(float*)` -> `gather<4, Half>`."""
    depth, demangled = 0, demangled.replace("(anonymous namespace)::", "")
    for place, letter in enumerate(demangled):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            demangled = demangled[:place]
            break
    return re.sub(r"^void |\([\w:]+\)|(\w+::)+", "", demangled)


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Symbol -> `kernel_name`."""
    names = list(names)
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: kernel_name(line) for name, line in zip(names, run.stdout.splitlines(), strict=True)}


def parse_resources(log: str) -> Kernels:
    """arch -> symbol -> what ptxas says of it."""
    kernels: Kernels = {}
    current = Kernel()
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            current = kernels.setdefault(found[2], {}).setdefault(found[1], Kernel())
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack, current.spills = int(found[1]), int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            current.registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared = int(shared[1]) if shared else 0
    return kernels


def parse_sass(text: str) -> dict[str, list[str]]:
    """Symbol -> the names of its instructions."""
    kernels: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            current = kernels.setdefault(found[1], [])
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            current.append(found[1])
    return kernels


def with_headers(source: Path) -> list[Path]:
    """The source and the project's headers that it includes."""
    found, left = set(), [source]
    while left:
        file = left.pop()
        if file in found or not file.is_file():
            continue
        found.add(file)
        left += [ROOT / "csrc" / name for name in re.findall(r'^#include "(.+)"', file.read_text("utf-8"), re.M)]
    return sorted(found)


def key(source: Path) -> str:
    """Of all that its object is made from."""
    digest = hashlib.sha256(json.dumps([part().nvcc_flags, build()["NVCC"].version, tool("cuobjdump")]).encode())
    for file in with_headers(source):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run_nvcc(command: list[str]) -> tuple[int, str, float]:
    """Its status, what it says, and the CPU seconds that it took."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, text, used.ru_utime + used.ru_stime


def disassembled(object_file: Path, arch: str = "") -> dict[str, str]:
    """arch (its number) -> nvdisasm's text, of one of them or of all; empty without the tools."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    found: dict[str, str] = {}
    if cuobjdump and nvdisasm:
        with tempfile.TemporaryDirectory() as folder:
            command = [cuobjdump, "-xelf", "all", str(object_file)]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            for cubin in Path(folder).glob(f"*sm_{arch}*.cubin"):
                text = subprocess.run([nvdisasm, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
                found[re.findall(r"sm_(\d+)", cubin.name)[-1]] = text
    return found


@dataclass(frozen=True)
class Compiled:
    """A source after nvcc."""

    object_file: Path
    kernels: Kernels
    seconds: float
    """of CPU time"""


def compile_source(source: Path) -> Compiled:
    """As the build does it. Raises `RuntimeError` with nvcc's output. Results are kept in build/cubin."""
    kept = CACHE / f"{source.stem}-{key(source)}.json"
    if kept.is_file() and kept.with_suffix(".o").is_file():
        facts = json.loads(kept.read_text("utf-8"))
        kernels = {a: {n: Kernel(**k) for n, k in of.items()} for a, of in facts["kernels"].items()}
        return Compiled(kept.with_suffix(".o"), kernels, facts["seconds"])
    CACHE.mkdir(parents=True, exist_ok=True)
    for stale in CACHE.glob(f"{source.stem}-*"):
        if re.fullmatch(rf"{source.stem}-[0-9a-f]{{16}}\.\w+", stale.name):
            stale.unlink(missing_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}.o")
    flags = ["-Werror=all-warnings", "--resource-usage", *part().nvcc_flags]
    status, log, seconds = run_nvcc([nvcc()[0], *flags, "-c", str(source), "-o", str(partial)])
    if status:
        said = [line for line in log.splitlines() if "ptxas info" not in line and "bytes stack frame" not in line]
        raise RuntimeError("\n".join([f"nvcc refuses {source.name}:", *said])[:4000])
    if serialized := sorted(set(re.findall(r"\(C75\d\d\).*wgmma.*serialized.*", log))):
        raise RuntimeError("\n".join([f"{source.name}: wgmma would wait for each other:", *serialized])[:4000])
    sass = {arch: parse_sass(text) for arch, text in disassembled(partial).items()}
    kernels = {arch: {} for arch in ARCHS}
    for arch, symbols in parse_resources(log).items():
        names = demangle(symbols)
        for symbol, kernel in symbols.items():
            kernel.sass = sorted(set(sass.get(arch.rstrip("af"), {}).get(symbol, ())))
            kernels[arch][names[symbol]] = kernel
        if len(kernels[arch]) < len(symbols):
            raise RuntimeError(f"{source.name}: two kernels share a name: {sorted(names.values())}")
    facts = {"seconds": round(seconds, 1)}
    facts["kernels"] = {arch: {name: vars(kernel) for name, kernel in of.items()} for arch, of in kernels.items()}
    partial.replace(kept.with_suffix(".o"))
    partial = kept.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(facts), "utf-8")
    partial.replace(kept)
    return Compiled(kept.with_suffix(".o"), kernels, facts["seconds"])


def in_flight(compiled: Compiled) -> dict[str, list[str]]:
    """Each kernel with products of warpgroups -> its accesses to their registers in flight (see sass_products.py).

    The kept object is disassembled again for it: what is kept of it can do without a megabyte of text, and a change of
    that check counts at once.
    """
    with_products = [n for n, k in compiled.kernels["90a"].items() if any(map(sass_products.PRODUCT.match, k.sass))]
    found = {name: ["it is not in what nvdisasm prints"] for name in with_products}
    if found:
        codes = sass_products.kernels(disassembled(compiled.object_file, "90")["90"])
        names = demangle(codes)
        found |= {names[symbol]: sass_products.faults(code) for symbol, code in codes.items()}
    return found


def has(sass: list[str], wanted: str) -> bool:
    """Whether an instruction is there by its name and modifiers: `LDG.128` is in `LDG.E.NA.128.CONSTANT`."""
    name, *modifiers = wanted.split(".")
    return any(i.split(".")[0] == name and set(modifiers) <= set(i.split(".")[1:]) for i in sass)


def faults(kernel: Kernel, arch: str, allowed: dict[str, Any] | None) -> list[str]:
    """What is wrong with it, in words; `allowed` is its entry of the budget."""
    found = []
    if kernel.spills or kernel.stack:
        found.append(f"{kernel.spills} bytes of spills, {kernel.stack} bytes of stack; both must be 0")
    found += [f"{name}: {text}" for name, text in NEVER.items() if has(kernel.sass, name)]
    if allowed is None or arch not in allowed:
        return [*found, "it is not in csrc/cuda/budget.json; run python tests/cuda_budget.py --update"]
    most = allowed[arch]
    if kernel.registers > most["registers"]:
        found.append(f"{kernel.registers} registers, the budget has {most['registers']}")
    if kernel.shared > most["shared"]:
        found.append(f"{kernel.shared} bytes of shared memory, the budget has {most['shared']}")
    if kernel.sass:
        wanted = [*allowed.get("sass", ()), *most.get("sass", ())]
        found += [f"no {name} among its instructions" for name in wanted if not has(kernel.sass, name)]
    return found


def read_budget() -> dict[str, dict[str, dict[str, Any]]]:
    """source -> kernel -> entry."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(BUDGET.read_text("utf-8")) if BUDGET.is_file() else {}
    return found


def updated(old: dict[str, dict[str, Any]], measured: Kernels) -> dict[str, dict[str, Any]]:
    """The entries of a source by what was measured, and by the instructions asked for."""
    entries: dict[str, dict[str, Any]] = {}
    for arch, kernels in measured.items():
        for name, kernel in sorted(kernels.items()):
            before = old.get(name, {})
            entry = entries.setdefault(name, {"sass": before.get("sass", [])})
            registers = -(-kernel.registers // REGISTER_UNIT) * REGISTER_UNIT
            entry[arch] = {"registers": registers, "shared": kernel.shared}
            if wanted := before.get(arch, {}).get("sass"):
                entry[arch]["sass"] = wanted
    return dict(sorted(entries.items()))


def write_budget(budget: dict[str, dict[str, dict[str, Any]]]) -> None:
    """One line a kernel and architecture, so that a diff shows what changed."""
    text = json.dumps(dict(sorted(budget.items())), indent=1)
    text = re.sub(r'\{\s+"registers": (\d+),\s+"shared": (\d+)', r'{"registers": \1, "shared": \2', text)
    text = re.sub(r"\n\s+\}", lambda found: found[0], text)
    text = re.sub(r'("shared": \d+)\s+\}', r"\1}", text)
    text = re.sub(r'\[\s*((?:"[^"]*",?\s*)*)\]', lambda found: f"[{' '.join(found[1].split())}]", text)
    partial = BUDGET.with_suffix(".partial")
    partial.write_text(text + "\n", "utf-8")
    partial.replace(BUDGET)


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write csrc/cuda/budget.json")
    parser.add_argument("sources", nargs="*", help="names in csrc/cuda (default: all)")
    args = parser.parse_args()
    if reason := nvcc()[1]:
        sys.exit(reason)
    wanted = [source for source in SOURCES if not args.sources or source.name in args.sources]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = dict(zip(wanted, pool.map(compile_source, wanted), strict=True))
    budget = read_budget()
    for source, compiled in results.items():
        touched = in_flight(compiled)
        if args.update:
            budget[source.name] = updated(budget.get(source.name, {}), compiled.kernels)
        print(f"{source.name}: {compiled.seconds} s of CPU time to compile")
        for arch, kernels in compiled.kernels.items():
            for name, kernel in sorted(kernels.items()):
                print(f"  sm_{arch} {name}: {kernel.registers} registers, {kernel.shared} bytes shared")
                wrong = faults(kernel, arch, budget.get(source.name, {}).get(name))
                for fault in wrong + (touched.get(name, []) if arch == "90a" else []):
                    print(f"    {fault}")
    if args.update:
        there = {source.name for source in SOURCES}
        write_budget({name: entries for name, entries in budget.items() if name in there and entries})
    return 0


if __name__ == "__main__":
    sys.exit(main())
