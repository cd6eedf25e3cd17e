"""Every Triton kernel compiled ahead of time, without a GPU, and what its assembly must contain.

The sizes are those that the planner would take for a decode or a prefill call; shorter where only the compiler's time
would change.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from lutgemm.backends import triton as backend

pytestmark = pytest.mark.skipif(
    backend.missing() is not None or backend.INTERPRETED,
    reason=f"backend triton: {backend.missing() or 'TRITON_INTERPRET is set, so kernels are not compiled'}",
)

CUDA_ARCHITECTURES = (80, 86, 90, 100)
ALIGNED = ("num_words", "num_vectors", "K", "N", "MN", "num_groups")
"""Integers that Triton would find to be multiples of 16 in layers of usual sizes."""

BCQ = {"BITS": 2, "KIND": 0, "HAS_OFFSETS": True, "HAS_BIAS": False, "PARTIAL": False, "GROUP_UNITS": 4}
BOOKS = {"BOOKS": 1, "ENTRIES": 256, "GROUP_UNITS": 32}
TABLES = {"BLOCK_M": 1, "BLOCK_N": 64, "CHUNK": 4, "CHUNKS": 8, "STAGES": 3}
DOT = {"BLOCK_M": 64, "BLOCK_N": 64, "STAGES": 3}
EPILOGUE = {"HAS_BIAS": True, "PARTIAL": False, "SIBLINGS": 1}

KERNELS: dict[str, dict[str, Any]] = {
    "lut_gemm": BCQ | TABLES,
    "biqgemm": BCQ | TABLES | {"BLOCK_M": 2, "BLOCK_N": 32, "PARTIAL": True},
    "psumbook": {"BOOKS": 1, "ENTRIES": 256, "VEC_LEN": 4, "BLOCK_M": 1, "BLOCK_J": 8, "BLOCK_E": 256},
    "codegemm": BOOKS | EPILOGUE | {"BLOCK_M": 1, "BLOCK_N": 64, "CHUNK": 16, "CHUNKS": 4, "STAGES": 1},
    "bcq_dequantize": {
        **{k: BCQ[k] for k in ("BITS", "KIND", "HAS_OFFSETS", "GROUP_UNITS")},
        "BLOCK_N": 16,
        "BLOCK_U": 8,
    },
    "codebook_dequantize": BOOKS | {"VEC_LEN": 4, "BLOCK_N": 16, "BLOCK_U": 64},
    "bcq_dequant_gemm": BCQ | DOT | {"BLOCK_U": 2},
    "codebook_dequant_gemm": BOOKS | EPILOGUE | DOT | {"VEC_LEN": 8, "GROUP_UNITS": 16, "BLOCK_U": 8},
    "reduce": {"HAS_BIAS": True, "BLOCK": 1024},
}
"""Kernel -> its constants."""


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def kernel_named(name: str) -> Any:
    from lutgemm.kernels import biqgemm, codegemm, dequant_gemm, dequantize, lut_gemm, reduce

    for module in (lut_gemm, biqgemm, codegemm, dequantize, dequant_gemm, reduce):
        if hasattr(module, f"{name}_kernel"):
            return getattr(module, f"{name}_kernel")
    raise KeyError(name)


def pointer_types(name: str, dtype: str, scales: str) -> dict[str, str]:
    """The type of each pointer that any kernel takes."""
    kinds = {"x_ptr": dtype, "bias_ptr": dtype, "w_ptr": dtype, "y_ptr": dtype, "out_ptr": dtype}
    kinds |= {"scales_ptr": scales, "offsets_ptr": scales, "codebooks_ptr": scales, "zeros_ptr": "u8"}
    kinds |= {"ratios_ptr": "fp32", "psums_ptr": "fp32", "parts_ptr": "fp32"}
    kinds["codes_ptr"] = "u8" if name.startswith("code") else "i32"
    if name == "biqgemm":
        kinds["out_ptr"] = "fp32"
    return {pointer: f"*{kind}" for pointer, kind in kinds.items()}


@cache
def compiled(name: str, target: tuple[str, int | str, int], dtype: str = "fp16", changes: tuple = ()) -> dict[str, Any]:
    """The assembly of a kernel by its kind ("ptx", "amdgcn", ..). changes: of its constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lutgemm.kernels import start

    kernel = kernel_named(name)
    constants = KERNELS[name] | dict(changes)
    if name == "codegemm":
        constants |= {"REVERSED": start.LANES_ALONG_FIRST}
    types = pointer_types(name, dtype, "fp16")
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    aligned = [i for i, a in enumerate(kernel.arg_names) if a not in constants and (a in types or a in ALIGNED)]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget(*target), options={"num_warps": 4, "enable_fp_fusion": True}).asm


def instructions(assembly: str) -> Counter:
    """How often each instruction occurs in PTX or AMD's assembly."""
    return Counter(re.findall(r"^\s+(?:@!?%\w+\s+)?([a-z][\w.:]+)", assembly, re.M))


def shuffles(counts: Counter) -> int:
    return sum(n for op, n in counts.items() if op.startswith("shfl"))


def cuda(architecture: int) -> tuple[str, int, int]:
    return ("cuda", architecture, 32)


@pytest.mark.parametrize("architecture", CUDA_ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_nvidia(name: str, architecture: int):
    found = compiled(name, cuda(architecture))
    assert f".target sm_{architecture}" in found["ptx"]
    assert len(found["cubin"]) > 1000
    counts = instructions(found["ptx"])
    copies = [op for op in counts if re.search(r"(ld|st)\.global.*\.v[24]\.b(32|64)|cp\.async\.cg", op)]
    assert copies, f"no access of 8 bytes or more: {counts}"
    assert not any("atom" in op or op.startswith("red.") for op in counts)
    tensor_cores = sum(n for op, n in counts.items() if op.startswith(("mma.sync", "wgmma.mma_async", "tcgen05.mma")))
    assert bool(tensor_cores) == name.endswith("dequant_gemm"), counts
    look_ups = counts["shfl.sync.idx.b32"]
    if name in ("lut_gemm", "biqgemm"):
        sizes = KERNELS[name]
        words = sizes["CHUNK"] * sizes["CHUNKS"] * sizes["BLOCK_N"] * sizes["BITS"] * sizes["BLOCK_M"]
        each = words * 8 // 128
        assert each <= look_ups < 1.05 * each, f"{look_ups} shuffles for {each} look-ups of a thread"
    if name == "codegemm":
        assert shuffles(counts) < 10, "sums over a chunk cross lanes"


@pytest.mark.parametrize("name", ["lut_gemm", "codegemm", "bcq_dequant_gemm"])
def test_sizes_of_one_compile(name: str):
    """Triton makes a constant of every integer argument that is 1."""
    integers = [a for a in kernel_named(name).arg_names if a not in KERNELS[name] and not a.endswith("_ptr")]
    assert "target sm_90" in compiled(name, cuda(90), changes=tuple((a, 1) for a in integers))["ptx"]


@pytest.mark.parametrize("name", ["codegemm", "codebook_dequant_gemm"])
def test_codebooks_of_siblings_cost_comparisons_only(name: str):
    one, three = (instructions(compiled(name, cuda(90), changes=(("SIBLINGS", n),))["ptx"]) for n in (1, 3))
    assert shuffles(three) == shuffles(one)
    assert three.total() < 1.2 * one.total()


@pytest.mark.parametrize("kind", [1, 2])
def test_other_scale_kinds(kind: int):
    counts = instructions(compiled("lut_gemm", cuda(90), "bf16", (("KIND", kind), ("BITS", 1)))["ptx"])
    assert 128 <= counts["shfl.sync.idx.b32"] < 135


def test_fp32_is_multiplied_in_fp32():
    counts = instructions(compiled("bcq_dequant_gemm", cuda(90), "fp32", (("BLOCK_M", 16), ("BLOCK_U", 1)))["ptx"])
    assert counts["fma.rn.f32"] > 100
    assert not any("mma" in op for op in counts)


def test_bf16_uses_tensor_cores():
    counts = instructions(compiled("bcq_dequant_gemm", cuda(80), "bf16", (("BLOCK_M", 16), ("BLOCK_U", 1)))["ptx"])
    assert any(op.startswith("mma.sync") and "bf16" in op for op in counts)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bcq_dequantize", (("BITS", 3),)),
        ("bcq_dequantize", (("BITS", 3), ("KIND", 1))),
        ("codebook_dequantize", (("BOOKS", 2),)),
    ],
)
def test_dequantize_fuses_nothing(name: str, changes: tuple):
    """A fused multiply-add would round once where SPEC.md rounds twice."""
    counts = instructions(compiled(name, cuda(90), changes=changes)["ptx"])
    assert not any(op.startswith("fma") for op in counts)


@pytest.mark.parametrize("name", ["lut_gemm", "codegemm", "bcq_dequantize", "bcq_dequant_gemm", "reduce"])
def test_amd(name: str):
    pytest.importorskip("triton.backends.amd.compiler")
    counts = instructions(compiled(name, ("hip", "gfx942", 64))["amdgcn"])
    assert any(op.startswith(("global_load", "buffer_load")) for op in counts)
    assert any("mfma" in op for op in counts) == name.endswith("dequant_gemm")
    assert not any("atomic" in op for op in counts)
    if name == "lut_gemm":
        assert counts["ds_bpermute_b32"] >= 256, "look-ups are moves between lanes"
