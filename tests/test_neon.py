"""The kernels of 64-bit ARM on every case, cross-compiled, under an emulator; torch's side of the package runs here.

Needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user). Without them the tests are
skipped, or fail under `--require neon`.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import backend_names
from integer_bounds import per_span_bound
from torch import Tensor

from lutgemm.accuracy import ACCURACIES
from lutgemm.backends import cpu
from lutgemm.formats import BCQWeight, CodebookWeight
from lutgemm.testing.cases import CASES, Inputs, OpCase
from lutgemm.testing.numerics import (
    assert_equal,
    assert_within,
    error_bound,
    exact_result,
    rms,
    rounded_allowance,
    torch_allowance,
)

ROOT = Path(__file__).resolve().parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ("-O2", "-g1", "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-static", "-pthread")
FLAGS += ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))

KERNELS = ("lut_gemm", "biqgemm", "dequantize_bcq", "codegemm", "dequantize_codebook")
"""By the number that csrc/test/run_cases.cpp knows them by."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
NEON = 1
STATISTICAL = 32

ALL = [case for make in CASES.values() for case in make()]
FULL = [case for case in ALL if case.accuracy == "exact"]
EXACT = [case for case in FULL if case.has_tier("exact")]
ROUNDED = [case for case in ALL if case.accuracy != "exact" and case.op == "bcq_linear"]
EDGES = [
    OpCase(M=5, N=200, K=1000, bits=2, group_size=g, offsets=False, accuracy=a, outliers=True)
    for g in (32, 64, 128, 320, 0)
    for a in ACCURACIES[:-1]
]


@dataclass(frozen=True)
class Call:
    """One kernel on one case."""

    case: OpCase
    tier: str
    kernel: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.tier} {self.case.name}"


def calls() -> list[Call]:
    found = []
    for case in ALL + EDGES:
        bcq = case.op == "bcq_linear"
        kernels = KERNELS[:2] if bcq else ("codegemm",)
        tiers = ["exact"] * (case in EXACT) + ["random"]
        found += [Call(case, tier, kernel) for tier in tiers for kernel in kernels]
        if case.accuracy == "exact":
            found.append(Call(case, "random", KERNELS[2 if bcq else 4]))
    return found


def blob(tensor: Tensor | None) -> bytes:
    data = b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return struct.pack("<q", len(data)) + data


def encode(call: Call, inputs: Inputs) -> bytes:
    """The call as csrc/test/run_cases.cpp reads it."""
    case, w = call.case, inputs.weight
    zeros = uniform = offsets = None
    if isinstance(w, CodebookWeight):
        codes, scales, extra = w.codes, w.scales, w.codebooks
    else:
        assert isinstance(w, BCQWeight)
        tensors = (w.codes, w.scales, w.offsets, w.zeros, w.ratios)
        codes, scales, offsets, zeros, *_, uniform = cpu._bcq_tensors(*tensors, case.K, w.group_size, w.scale_kind)
        extra = zeros if uniform else offsets
    fields = (
        KERNELS.index(call.kernel),
        *(case.M, case.N, case.K, w.group_size, case.codebook_bits if case.op == "codebook_linear" else case.bits),
        *(bool(uniform), offsets is not None, case.num_codebooks, case.vec_len),
        *(DTYPES.index(inputs.x.dtype), DTYPES.index(scales.dtype), 0 if zeros is None else DTYPES.index(zeros.dtype)),
        *(NEON, ACCURACIES.index(case.accuracy)),
    )
    return struct.pack(f"<{len(fields)}q", *fields) + b"".join(map(blob, (inputs.x, inputs.bias, codes, scales, extra)))


def build(folder: Path) -> Path:
    """The kernels and their driver as one static program, compiled a few files at a time."""
    program, objects = folder / "run_cases", []
    compilers = []
    for source in [*SOURCES, ROOT / "csrc" / "test" / "run_cases.cpp"]:
        objects.append(str(folder / f"{source.stem}.o"))
        compilers.append(subprocess.Popen([COMPILER, *FLAGS, "-c", str(source), "-o", objects[-1]]))
        if len(compilers) == 4:
            assert all(compiler.wait() == 0 for compiler in compilers), "compiling failed; see above"
            compilers.clear()
    assert all(compiler.wait() == 0 for compiler in compilers), "compiling failed; see above"
    subprocess.run([COMPILER, *FLAGS, *objects, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def inputs_of() -> dict[tuple[OpCase, str], Inputs]:
    return {}


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, inputs_of: dict
) -> dict[Call, Tensor]:
    """y `[M, N]`, or W `[N, K]` where dequantized, of every call."""
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    missing += [] if SOURCES else [f"{ROOT}/csrc"]
    if missing:
        reason = f"not found: {', '.join(missing)}"
        if "neon" in backend_names(request.config, "--require"):
            pytest.fail(f"--require neon: {reason}")
        pytest.skip(f"neon: {reason}")
    folder = tmp_path_factory.mktemp("neon")
    program, wanted = build(folder), calls()
    with (folder / "cases").open("wb") as file:
        for call in wanted:
            key = (call.case, call.tier)
            if key not in inputs_of:
                inputs_of[key] = call.case.inputs(call.tier)
            file.write(encode(call, inputs_of[key]))
    command = [EMULATOR, str(program), str(folder / "cases"), str(folder / "results")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(wanted)} cases, isa {NEON}\n"
    found, data, at = {}, bytearray((folder / "results").read_bytes()), 0
    for call in wanted:
        (size,) = struct.unpack_from("<q", data, at)
        shape = (call.case.N, call.case.K) if call.kernel.startswith("dequantize") else (call.case.M, call.case.N)
        dtype = call.case.torch_dtype
        y = torch.frombuffer(data, dtype=dtype, count=size // dtype.itemsize, offset=at + 8) if size else torch.empty(0)
        found[call] = y.to(dtype).view(shape)
        at += 8 + size
    assert at == len(data)
    return found


@pytest.mark.parametrize("kernel", ["lut_gemm", "biqgemm", "codegemm"])
def test_the_exact_tier_is_bit_exact(kernel: str, results: dict[Call, Tensor], inputs_of: dict):
    checked = [call for call in results if call.kernel == kernel and call.tier == "exact"]
    assert len(checked) >= 100
    for call in checked:
        inputs = inputs_of[call.case, "exact"]
        truth = exact_result(inputs.x, inputs.weight, inputs.bias)
        assert_equal(results[call], truth.to(inputs.x.dtype), str(call))


@pytest.mark.parametrize("kernel", ["lut_gemm", "biqgemm", "codegemm"])
def test_the_random_tier_is_within_its_bounds(kernel: str, results: dict[Call, Tensor], inputs_of: dict):
    for call, y in results.items():
        if call.kernel == kernel and call.tier == "random" and call.case.accuracy == "exact":
            inputs = inputs_of[call.case, "random"]
            truth = exact_result(inputs.x, inputs.weight, inputs.bias)
            assert_within(y, truth, error_bound(inputs.x, inputs.weight, inputs.bias, kernel), str(call))
            if y.numel() >= STATISTICAL:
                assert rms(y.double() - truth) <= torch_allowance(*vars(inputs).values()), str(call)


def test_weights_are_dequantized_bit_for_bit(results: dict[Call, Tensor], inputs_of: dict):
    checked = [call for call in results if call.kernel.startswith("dequantize")]
    assert len(checked) == len(FULL)
    for call in checked:
        weight = inputs_of[call.case, call.tier].weight
        assert_equal(results[call], weight.dequantize(call.case.torch_dtype), str(call))


@pytest.mark.parametrize("accuracy", ACCURACIES[:-1])
def test_codebooks_keep_their_error(accuracy: str, results: dict[Call, Tensor], inputs_of: dict):
    checked = [call for call in results if call.case.accuracy == accuracy and call.kernel == "codegemm"]
    assert checked
    for call in checked:
        inputs = inputs_of[call.case, "random"]
        error = results[call].double() - exact_result(inputs.x, inputs.weight, inputs.bias)
        assert rms(error) <= rounded_allowance(*vars(inputs).values(), accuracy), str(call)


@pytest.mark.parametrize("accuracy", ACCURACIES[:-1])
def test_integer_tables_keep_their_error(accuracy: str, results: dict[Call, Tensor], inputs_of: dict):
    """In root mean square, and every element within the derived bound; both algorithms are one kernel."""
    checked = [call for call in results if call.case.accuracy == accuracy and call.kernel == "lut_gemm"]
    assert len(checked) == sum(case.accuracy == accuracy for case in ROUNDED + EDGES)
    for call in checked:
        inputs, y = inputs_of[call.case, "random"], results[call]
        assert isinstance(inputs.weight, BCQWeight)
        truth = exact_result(inputs.x, inputs.weight, inputs.bias)
        assert rms(y.double() - truth) <= rounded_allowance(*vars(inputs).values(), accuracy), str(call)
        bound = per_span_bound(inputs.x, inputs.weight, 4, accuracy)
        bound = bound * 1.01 + error_bound(inputs.x, inputs.weight, inputs.bias, "lut_gemm")
        assert_within(y, truth, bound, str(call))
        assert_equal(results[replace(call, kernel="biqgemm")], y, str(call))
