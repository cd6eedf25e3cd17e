"""Every CUDA source compiled as the build does it: registers, spills, shared memory, instructions; and all linked.

Needs nvcc, and cuobjdump and nvdisasm for the instructions (the triton package brings them). Without them the tests are
skipped, or fail under `--require nvcc`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cuda_budget
import pytest
import sass_products
from conftest import REQUIRED
from cuda_budget import ARCHS, ROOT, SOURCES, Compiled

Running = dict[Path, "Future[Compiled]"]


def missing() -> str | None:
    """Why nothing can be compiled here."""
    if reason := cuda_budget.nvcc()[1] or cuda_budget.part().missing:
        return str(reason)
    absent = [name for name in ("cuobjdump", "nvdisasm") if cuda_budget.tool(name) is None]
    return f"{' and '.join(absent)} not found; pip install triton" if absent else None


@pytest.fixture(scope="module")
def compiled() -> Iterator[Running]:
    """Source -> what nvcc makes of it; all at once, the longest first."""
    if reason := missing():
        if "nvcc" in REQUIRED:
            pytest.fail(f"--require nvcc: {reason}")
        pytest.skip(reason)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        by_size = sorted(SOURCES, key=lambda path: path.stat().st_size, reverse=True)
        yield {source: pool.submit(cuda_budget.compile_source, source) for source in by_size}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_kernel_is_within_its_budget(source: Path, compiled: Running) -> None:
    budget = cuda_budget.read_budget().get(source.name, {})
    kernels = compiled[source].result().kernels
    wrong = {
        f"sm_{arch} {name}": cuda_budget.faults(kernel, arch, budget.get(name))
        for arch in ARCHS
        for name, kernel in kernels[arch].items()
    }
    wrong |= {name: ["the budget has it, the source does not"] for name in budget.keys() - kernels[ARCHS[0]].keys()}
    assert not {name: faults for name, faults in wrong.items() if faults}


def test_no_kernel_touches_products_in_flight(compiled: Running) -> None:
    checked = {
        f"{source.name} {name}": faults
        for source, future in compiled.items()
        for name, faults in cuda_budget.in_flight(future.result()).items()
    }
    assert checked, "no kernel has products of warpgroups"
    assert not {name: faults for name, faults in checked.items() if faults}


def in_flight(*lines: str) -> list[str]:
    """What is wrong with a kernel of these instructions, the first one at 0x0100, and labels."""
    text, address = ['	.section	.text._Z1kv,"ax",@progbits', "_Z1kv:"], 0x100
    for line in lines:
        label = line.endswith(":")
        text.append(line if label else f"        /*{address:04x}*/       {line} ;")
        address += 0 if label else 16
    (code,) = sass_products.kernels("\n".join(text)).values()
    assert [str(one).split(maxsplit=1)[1] for one in code.instructions] == [i for i in lines if not i.endswith(":")]
    return sass_products.faults(code)


PRODUCTS = (
    "HGMMA.64x16x16.F32 R24, R40, gdesc[UR8], R24, !UPT",
    "HGMMA.64x16x16.F32 R24, R44, gdesc[UR8], R24, gsb0",
)
"""One group of two: R24..R31 = A in R40..R43 x B, then += A in R44..R47 x B."""
OTHER = "HGMMA.64x16x16.F32 R32, R48, gdesc[UR8], R32, gsb0"
"""A group of its own."""
WAIT, WAIT_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


@pytest.mark.parametrize(
    "lines",
    [
        (*PRODUCTS, "STS.128 [R36], R40", WAIT, "FADD R0, R24, R31", "LDS.128 R40, [R36]", "EXIT"),
        (*PRODUCTS, OTHER, WAIT_BUT_ONE, "FADD R24, R24, R31", "MOV R47, RZ", WAIT, "MOV R48, R32", "EXIT"),
        (*PRODUCTS, "@P0 BRA `(.L_x_1)", WAIT, "FADD R0, R24, R31", "EXIT", ".L_x_1:", WAIT, "MOV R40, R24", "EXIT"),
        (".L_x_1:", *PRODUCTS, WAIT, "LDS.128 R40, [R36]", "@P0 BRA `(.L_x_1)", "FADD R0, R24, R31", "EXIT"),
        (*PRODUCTS, "IMAD.WIDE R22, R23, R33, R32", "CS2R R22, SRZ", "ISETP.NE.AND P0, PT, R40, RZ, PT", "EXIT"),
    ],
    ids=["wait", "wait but for one group", "wait on both paths", "loop", "other registers"],
)
def test_products_in_flight_that_nothing_touches(lines: tuple[str, ...]) -> None:
    assert in_flight(*lines) == []


@pytest.mark.parametrize(
    ("lines", "address", "what"),
    [
        ((*PRODUCTS, "LDS.128 R40, [R36]", WAIT), 0x120, "writes A (R40, R41, R42, R43)"),
        ((*PRODUCTS, "STS.64 [R36], R30", WAIT), 0x120, "reads sums (R30, R31)"),
        ((*PRODUCTS, "SHFL.IDX PT, R31, R0, RZ, 0x1f", WAIT), 0x120, "writes sums (R31)"),
        ((*PRODUCTS, "IMAD.WIDE R22, R0, R1, R30", WAIT), 0x120, "reads sums (R30, R31)"),
        ((*PRODUCTS, "@!P0 BRA `(.L_x_1)", WAIT, ".L_x_1:", "FADD R0, R24, R1", "EXIT"), 0x140, "reads sums (R24)"),
        ((*PRODUCTS, "BRA !P0, `(.L_x_1)", WAIT, ".L_x_1:", "FADD R0, R24, R1", "EXIT"), 0x140, "reads sums (R24)"),
        ((*PRODUCTS, "@P0 WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R0, R24, R1", "EXIT"), 0x130, "reads sums (R24)"),
        (
            (*PRODUCTS, 'BRX R6 -0x120 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)', ".L_x_1:", WAIT, ".L_x_2:", "MOV R0, R24"),
            0x140,
            "reads sums (R24)",
        ),
        ((*PRODUCTS, "CALL.REL.NOINC `($f)", WAIT, "EXIT", "$f:", "MOV R47, RZ", "RET R6"), 0x150, "writes A (R47)"),
        ((*PRODUCTS, "CALL.REL.NOINC `($f)", "MOV R47, RZ", "EXIT", "$f:", "NOP", "RET R6"), 0x130, "writes A (R47)"),
        ((OTHER, *PRODUCTS, WAIT_BUT_ONE, "MOV R0, R24", WAIT), 0x140, "reads sums (R24)"),
        ((".L_x_1:", "MOV R44, RZ", *PRODUCTS, "@P0 BRA `(.L_x_1)", WAIT, "EXIT"), 0x100, "writes A (R44)"),
        ((*PRODUCTS, OTHER.replace("R32", "R40"), WAIT), 0x120, "writes A (R40, R41, R42, R43)"),
    ],
    ids=[
        "A is overwritten",
        "sums are read",
        "sums are overwritten",
        "a wide operand",
        "branch around the wait",
        "branch with a condition",
        "wait under a predicate",
        "jump by a table",
        "in a function",
        "after a function",
        "wait for the group before",
        "the next turn of a loop",
        "by another product",
    ],
)
def test_products_in_flight_that_are_touched(lines: tuple[str, ...], address: int, what: str) -> None:
    found = in_flight(*lines)
    places = {fault.split()[0] for fault in found}
    assert places == {f"{address:#06x}"}
    assert any(f": {what} of the product in flight since 0x01" in fault for fault in found), found


STUB = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 0; }\n'
LOADED = """
import sys, torch
from lutgemm.backends import gpu_layouts
torch.ops.load_library(sys.argv[1])
names = {name.partition(".")[0] for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")}
ours = {name.partition("::")[2] for name in names if name.startswith("lutgemm::")}
print(*sorted(ours))
try:
    torch.ops.lutgemm._gpu_capability(0)
except RuntimeError as error:
    print(error)
"""


def test_the_library_links_and_registers_its_operators(compiled: Running, tmp_path: Path) -> None:
    """Of all that it needs, a torch without CUDA lacks the current stream alone; with a stub of that, it loads."""
    objects = [str(future.result().object_file) for future in compiled.values()]
    part = cuda_budget.part()
    for source in part.sources:
        if source.endswith(".cpp"):
            objects.append(str(tmp_path / f"{Path(source).stem}.o"))
            flags = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", *part.flags]
            subprocess.run(["g++", *flags, "-c", source, "-o", objects[-1]], cwd=ROOT, check=True)
    stub, library = tmp_path / "libstub.so", tmp_path / "_C_cuda.so"
    make_stub = ["g++", "-shared", "-fPIC", "-Wl,-soname,libstub.so", "-x", "c++", "-", "-o", str(stub)]
    subprocess.run(make_stub, input=STUB, text=True, check=True)
    undefined = ["-Wl,-z,defs", f"-L{tmp_path}", "-lstub"]
    subprocess.run(["g++", "-shared", *objects, *part.links, *undefined, "-o", str(library)], check=True)
    symbols = subprocess.run(["nm", "-D", "-u", str(library)], check=True, capture_output=True, text=True).stdout
    unstable = [line for line in symbols.splitlines() if " _Z" in line and ("torch" in line or "c10" in line)]
    assert not unstable, "C++ names of torch are not stable"
    ran = subprocess.run(
        [sys.executable, "-c", LOADED, str(library)],
        env={**os.environ, "LD_PRELOAD": str(stub)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    registered, *error = ran.stdout.splitlines()
    bindings = "".join((ROOT / source).read_text("utf-8") for source in part.sources if source.endswith(".cpp"))
    assert set(registered.split()) == set(re.findall(r'"(_\w+_cuda|_gpu_place)\(', bindings))
    assert not error or "CUDA: cudaDeviceGetAttribute failed" in error[0]


def test_the_budget_is_of_these_sources() -> None:
    assert set(cuda_budget.read_budget()) <= {source.name for source in SOURCES}


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
ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
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
    (kernel,) = cuda_budget.parse_resources(log)["80"].values()
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
