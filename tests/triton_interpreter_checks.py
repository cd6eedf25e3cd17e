"""Triton's kernels in its interpreter, on CPU tensors: run by test_triton_interpreted.py in a process of its own.

Alone: `TRITON_INTERPRET=1 pytest tests/triton_interpreter_checks.py`.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import KernelRun
from torch import Tensor

import lutgemm
from lutgemm.backends import Problem, select
from lutgemm.backends import triton as backend
from lutgemm.errors import BackendError
from lutgemm.formats import BCQWeight
from lutgemm.kernels import config, launch
from lutgemm.kernels.config import Config, Device, Task
from lutgemm.testing.cases import CASES, Inputs, OpCase
from lutgemm.testing.numerics import assert_equal, assert_within, error_bound, exact_result, rms, rounded_allowance

assert backend.INTERPRETED, "set TRITON_INTERPRET=1"

ALL = [case for make in CASES.values() for case in make()]
FULL = [case for case in ALL if case.accuracy == "exact"]
EXACT = [case for case in FULL if case.has_tier("exact")]
RANDOM = [case for i, case in enumerate(FULL) if i % 6 == 0 or case not in EXACT or case.outliers]
ROUNDED = [case for case in ALL if case.accuracy != "exact"][::10]
IDENTITY = [
    OpCase(op=op, N=20, K=100, dtype=dtype, **extra)
    for dtype in ("float32", "bfloat16")
    for op, extra in (
        ("bcq_linear", {"bits": 3}),
        ("bcq_linear", {"bits": 4, "scale_kind": "uniform"}),
        ("bcq_linear", {"bits": 3, "scale_kind": "ratio", "scale_dtype": "bfloat16"}),
        ("codebook_linear", {"num_codebooks": 2, "vec_len": 8}),
    )
]


@pytest.mark.cases(EXACT)
def test_exact_tier_is_bit_exact(run: KernelRun):
    inputs = run.case.inputs("exact")
    assert_equal(run(inputs), exact_result(inputs.x, inputs.weight, inputs.bias).to(inputs.x.dtype), str(run))


@pytest.mark.cases(RANDOM)
def test_random_tier_is_within_its_bound(run: KernelRun):
    inputs = run.case.inputs("random")
    y = run(inputs)
    bound = error_bound(inputs.x, inputs.weight, inputs.bias, run.algorithm)
    assert_within(y, exact_result(inputs.x, inputs.weight, inputs.bias), bound, str(run))


@pytest.mark.cases(ROUNDED)
def test_every_accuracy_keeps_its_error(run: KernelRun):
    inputs = run.case.inputs("random")
    error = run(inputs).double() - exact_result(inputs.x, inputs.weight, inputs.bias)
    assert rms(error) <= rounded_allowance(*vars(inputs).values(), run.case.accuracy)


@pytest.mark.cases(IDENTITY)
def test_identity_activations_return_the_weight(run: KernelRun):
    """Bit for bit: by `dequantize` and `dequant_gemm` for any weight, by tables where no sum rounds."""
    case = replace(run.case, M=run.case.K)
    for tier in ("exact", "random") if run.algorithm.startswith("dequant") else ("exact",):
        weight = replace(case, dtype="float32").weight(tier)
        y = run(Inputs(torch.eye(case.K, dtype=case.torch_dtype), weight, None))
        assert_equal(y, weight.dequantize(case.torch_dtype).T, f"{run} {tier}")


@pytest.mark.cases([OpCase(op=op, M=m, N=70, K=200, bits=3, group_size=64) for op in CASES for m in (2, 17)])
def test_a_token_does_not_depend_on_its_neighbours(run: KernelRun):
    inputs = run.case.inputs()
    clean = run(inputs)
    x = inputs.x.clone()
    x[1, 5], x[1, 6] = float("nan"), float("inf")
    y = run(replace(inputs, x=x))
    others = torch.arange(len(x)) != 1
    assert y[1].isnan().all()
    assert_equal(y[others], clean[others], str(run))


@pytest.mark.cases([OpCase(op=op, M=5, N=20, K=100, bits=3) for op in CASES])
def test_what_lies_around_the_tensors_is_not_read(run: KernelRun):
    inputs = run.case.inputs("exact")
    expected = run(inputs)

    def guarded(t: Tensor) -> Tensor:
        fill = float("nan") if t.is_floating_point() else -1 if t.dtype != torch.uint8 else 255
        wide = torch.full((t.numel() + 66,), fill, dtype=t.dtype)
        wide[33 : 33 + t.numel()] = t.flatten()
        return wide[33 : 33 + t.numel()].view(t.shape)

    weight = type(inputs.weight)(inputs.weight.layout, {k: guarded(t) for k, t in inputs.weight.tensors.items()})
    assert_equal(run(Inputs(guarded(inputs.x), weight, None)), expected, str(run))


@pytest.mark.cases([OpCase(op=op, M=3, N=130, K=300, bits=3, group_size=64, bias=True) for op in CASES])
def test_five_runs_give_the_same_bits(run: KernelRun):
    inputs = run.case.inputs()
    first = run(inputs)
    for _ in range(4):
        assert_equal(run(inputs), first, str(run))


GPU = Device(processors=8)
"""A small one, so that K is cut into parts."""


def tasks(case: OpCase) -> list[tuple[str, Task]]:
    """Each algorithm with blocks that a GPU would use on this case."""
    weight, size = case.weight(), 4
    if isinstance(weight, BCQWeight):
        units = launch.group_units(case.K, weight.group_size, 32)
        names = ("lut_gemm", "biqgemm", "dequant_gemm")
        return [(name, Task(name, case.M, case.N, case.K, case.bits, 32, units, size)) for name in names]
    units = launch.group_units(case.K, weight.group_size, case.vec_len)
    sizes = (case.M, case.N, case.K, case.num_codebooks, case.vec_len, units, size, 2**case.codebook_bits)
    return [(name, Task(name, *sizes)) for name in ("codegemm", "dequant_gemm")]


@pytest.mark.parametrize(
    "case",
    [
        OpCase(M=3, N=70, K=700, bits=2, group_size=96, bias=True),
        OpCase(M=1, N=33, K=1100, bits=3, group_size=0, scale_kind="uniform"),
        OpCase(M=1, N=40, K=1300, bits=1, group_size=320, bias=True),
        OpCase(op="codebook_linear", M=3, N=70, K=300, group_size=24, bias=True),
        OpCase(op="codebook_linear", M=2, N=40, K=500, group_size=0, num_codebooks=2, vec_len=8),
    ],
    ids=lambda case: case.name,
)
def test_blocks_of_a_gpu_give_the_same_bits(case: OpCase, monkeypatch: pytest.MonkeyPatch):
    """Several row blocks, steps and parts of K, chunks that end within a group: unlike the interpreter's own sizes."""
    inputs = case.inputs("exact")
    truth = exact_result(inputs.x, inputs.weight, inputs.bias).float()
    for name, task in tasks(case):
        found = config.candidates(task, GPU)
        for cut in {found[0], max(found, key=lambda c: (c.splits, c.block_m))}:
            monkeypatch.setattr(backend, "_config", lambda task, device, cut=cut: list(cut))
            y = lutgemm.ops.linear(inputs.x, inputs.weight, inputs.bias, backend="triton", algorithm=name)
            assert_equal(y, truth, f"{name} {cut}")


def test_a_psumbook_that_does_not_fit_at_once(monkeypatch: pytest.MonkeyPatch):
    inputs = OpCase(op="codebook_linear", M=5, N=20, K=100).inputs("exact")
    monkeypatch.setattr(launch, "PSUMBOOK_BYTES", 2 * 4 * 25 * 64)
    y = lutgemm.codebook_linear(inputs.x, inputs.weight, backend="triton", algorithm="codegemm")
    assert_equal(y, exact_result(inputs.x, inputs.weight).float())


def test_parts_of_y_that_do_not_fit_at_once(monkeypatch: pytest.MonkeyPatch):
    inputs = OpCase(M=5, N=20, K=600, bits=1, bias=True).inputs("exact")
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 2 * 4 * 20 * 3)
    monkeypatch.setattr(backend, "_config", lambda task, device: [2, 32, 1, 8, 1, 4, 1])
    y = lutgemm.bcq_linear(inputs.x, inputs.weight, inputs.bias, backend="triton", algorithm="biqgemm")
    assert_equal(y, exact_result(inputs.x, inputs.weight, inputs.bias).float())


def test_panels_of_dequantize(monkeypatch: pytest.MonkeyPatch):
    for op in CASES:
        inputs = OpCase(op=op, M=3, N=65, K=100, bits=3, bias=True).inputs("exact")
        monkeypatch.setattr(backend, "PANEL_BYTES", 7 * 4 * 100)
        y = lutgemm.ops.linear(inputs.x, inputs.weight, inputs.bias, backend="triton", algorithm="dequantize")
        assert_equal(y, exact_result(inputs.x, inputs.weight, inputs.bias).float())


@pytest.mark.parametrize("algorithm", ["lut_gemm", "dequant_gemm"])
def test_gradients_are_those_of_the_dequantized_weight(algorithm: str):
    inputs = OpCase(M=4, N=20, K=72, bits=3, bias=True).inputs()
    scales = inputs.weight.scales.requires_grad_()
    x = inputs.x.requires_grad_()
    y = lutgemm.bcq_linear(x, inputs.weight, inputs.bias, backend="triton", algorithm=algorithm)
    assert y.requires_grad
    y.square().sum().backward()
    grads = x.grad, scales.grad
    x.grad = scales.grad = None
    lutgemm.bcq_linear(x, inputs.weight, inputs.bias, backend="reference").square().sum().backward()
    for own, expected in zip(grads, (x.grad, scales.grad), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)


def test_compiled_code_gives_the_same_bits():
    """The op of the package stays one call in a compiled graph; what it calls is eager."""
    inputs = OpCase(M=3, N=65, K=100, bits=3, bias=True).inputs()
    eager = lutgemm.bcq_linear(inputs.x, inputs.weight, inputs.bias, backend="triton") * 2

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: Tensor, bias: Tensor) -> Tensor:
        return lutgemm.bcq_linear(x, inputs.weight, bias, backend="triton") * 2

    assert_equal(compiled(inputs.x, inputs.bias), eager)


def test_leading_dimensions_and_no_tokens():
    inputs = OpCase(M=6, N=20, K=72).inputs("exact")
    y = lutgemm.bcq_linear(inputs.x.view(2, 3, 72), inputs.weight, backend="triton")
    assert_equal(y, exact_result(inputs.x, inputs.weight).float().view(2, 3, 20))
    assert lutgemm.bcq_linear(inputs.x[:0].view(0, 3, 72), inputs.weight, backend="triton").shape == (0, 3, 20)


def test_the_interpreter_is_there_and_auto_prefers_the_kernels_of_the_cpu():
    assert lutgemm.backends()["triton"] is None
    problem = Problem("bcq_linear", "cpu", torch.float32, 1, 20, 72, 32, 2, "free")
    assert select(problem, "triton")[0].name == "triton"
    if lutgemm.backends()["cpu"] is None:
        assert select(problem)[0].name == "cpu"


def test_an_index_beyond_32_bits_is_refused():
    problem = Problem("codebook_linear", "cpu", torch.float32, 1, 20, 2**24, 32, 4, vec_len=2, codebook_bits=12)
    with pytest.raises(BackendError, match="the Psumbook of one token would have"):
        select(problem, "triton", "codegemm")


def test_operators_write_to_nothing_that_they_are_given():
    inputs = OpCase(M=3, N=20, K=72, bias=True).inputs()
    t = inputs.weight.tensors
    cut = list(Config(4, 32, 1, 4, 1, 4, 1))
    record: tuple[Any, ...] = (inputs.x, t["codes"], t["scales"], t["offsets"], None, None, inputs.bias, 32, "free")
    torch.library.opcheck(
        torch.ops.lutgemm._triton_bcq_linear.default, (*record, "biqgemm", cut), test_utils=("test_schema",)
    )
