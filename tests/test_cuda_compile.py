"""Every CUDA source compiled for sm_80 and sm_90a: registers, spills, shared memory, instructions against the budget.

Needs nvcc, and nvdisasm for the instructions (the triton package brings one). Without them the tests are skipped, or
fail under `--require nvcc`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cuda_budget
import pytest
import torch
from conftest import backend_names
from cuda_budget import ARCHS, ROOT, SOURCES, Kernel

Compiled = dict[tuple[Path, str], "Future[dict[str, Kernel]]"]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """(source, arch) -> what nvcc makes of it, all at once."""
    reason = cuda_budget.nvcc()[1] or (
        None if cuda_budget.disassembler() else "nvdisasm was not found; pip install triton"
    )
    if reason and "nvcc" in backend_names(request.config, "--require"):
        pytest.fail(f"--require nvcc: {reason}")
    if cuda_budget.nvcc()[1]:
        pytest.skip(str(reason))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {
            (source, arch): pool.submit(cuda_budget.compile_source, source, arch)
            for source in SOURCES
            for arch in ARCHS
        }


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_kernel_is_within_its_budget(source: Path, arch: str, compiled: Compiled) -> None:
    budget = cuda_budget.read_budget().get(source.name, {})
    kernels = compiled[source, arch].result()
    wrong = {name: cuda_budget.faults(kernel, arch, budget.get(name)) for name, kernel in kernels.items()}
    wrong |= {name: ["the budget has it, the source does not"] for name in budget.keys() - kernels.keys()}
    assert not {name: faults for name, faults in wrong.items() if faults}


def test_the_budget_is_of_these_sources() -> None:
    assert set(cuda_budget.read_budget()) <= {source.name for source in SOURCES}


@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("bind_cuda*.cpp")), ids=lambda path: path.stem)
def test_bindings_ask_torch_for_nothing_that_is_not_stable(source: Path, tmp_path: Path) -> None:
    """Of torch they use C functions alone; all but the current CUDA stream are in a torch without CUDA too."""
    found = cuda_budget.build()["NVCC"]
    if found is None:
        pytest.skip(cuda_budget.nvcc()[1] or "")
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{ROOT / 'csrc'}", f"-isystem{torch_folder / 'include'}", f"-isystem{found.home / 'include'}"]
    target = f"-DTORCH_TARGET_VERSION={cuda_budget.build()['STABLE_ABI_TARGET']}"
    flags = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-DUSE_CUDA", target]
    command = ["g++", *flags, *includes, "-c", str(source), "-o", str(tmp_path / "object.o")]
    subprocess.run(command, check=True)
    listed = subprocess.run(["nm", "-u", str(tmp_path / "object.o")], check=True, capture_output=True, text=True)
    wanted = {line.split()[-1] for line in listed.stdout.splitlines()}
    of_torch = {name for name in wanted if ("torch" in name or "c10" in name) and "lutgemm" not in name}
    libraries = [ctypes.CDLL(str(torch_folder / "lib" / f"lib{name}.so")) for name in ("torch_cpu", "c10")]
    absent = {name for name in of_torch if not any(hasattr(library, name) for library in libraries)}
    assert of_torch
    assert absent <= {"aoti_torch_get_current_cuda_stream"}
    assert not {name for name in of_torch if name.startswith("_Z")}, "C++ names of torch are not stable"


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void lutgemm::cuda::(anonymous namespace)::rows<__half>(lutgemm::BcqWeight, long, __half*)", "rows<__half>"),
        ("void lutgemm::_GLOBAL__N__1_x_cu::dot<(int)4, (lutgemm::DType)1>(float const*)", "dot<4, 1>"),
        ("lutgemm::plain(int)", "plain"),
    ],
)
def test_names_of_kernels(demangled: str, name: str) -> None:
    assert cuda_budget.kernel_name(demangled) == name


def test_what_the_budget_finds_wrong() -> None:
    log = """
ptxas info    : Function properties for _Z1kv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 16 bytes cumulative stack size, 2048 bytes smem
"""
    sass = """
	.section	.text._Z1kv,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.NA.128.CONSTANT R12, desc[UR10][R14.64] ;
        /*0020*/                   STL [R1], R2 ;
"""
    (kernel,) = cuda_budget.parse_resources(log).values()
    kernel.sass = cuda_budget.parse_sass(sass)["_Z1kv"]
    assert (kernel.registers, kernel.shared, kernel.spills, kernel.stack) == (80, 2048, 12, 16)
    assert kernel.sass == ["LDC", "LDG.E.NA.128.CONSTANT", "STL"]
    allowed = {"sass": ["LDG.128", "HMMA"], "80": {"registers": 72, "shared": 1024}}
    assert cuda_budget.faults(kernel, "80", allowed) == [
        "12 bytes of spills, 16 bytes of stack; both must be 0",
        "STL: local memory is written",
        "80 registers, the budget has 72",
        "2048 bytes of shared memory, the budget has 1024",
        "no HMMA among its instructions",
    ]
    assert "not in csrc/cuda/budget.json" in cuda_budget.faults(kernel, "90a", allowed)[-1]
