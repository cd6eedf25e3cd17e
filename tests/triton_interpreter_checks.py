"""Triton's kernels in its interpreter, on CPU tensors: run by test_triton_interpreted.py in a process of its own.

Alone: `TRITON_INTERPRET=1 pytest tests/triton_interpreter_checks.py`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import KernelRun
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

import lutgemm
from lutgemm import traced
from lutgemm.accuracy import ACCURACIES
from lutgemm.backends import Problem, select
from lutgemm.backends import triton as backend
from lutgemm.errors import BackendError
from lutgemm.kernels import config, launch, siblings, start, tuning
from lutgemm.kernels.config import Config, Device, Task
from lutgemm.testing.cases import CASES, Inputs, OpCase
from lutgemm.testing.numerics import assert_equal, assert_within, error_bound, exact_result, rms, rounded_allowance

assert backend.INTERPRETED, "set TRITON_INTERPRET=1"
# A third of the interpreter's time, and no index of these shapes comes near 2**31.
interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)

ALL = [case for make in CASES.values() for case in make()]
FULL = [case for case in ALL if case.accuracy == "exact"]
EXACT = [case for case in FULL if case.has_tier("exact")]
RANDOM = [case for i, case in enumerate(FULL) if i % 6 == 0 or case not in EXACT or case.outliers]
ROUNDED = [case for case in ALL if case.accuracy != "exact"]
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


ERRORS: dict[tuple[str, OpCase], Tensor] = {}
"""Of the random tier, by algorithm and case; kernels are as exact whatever accuracy is asked for: see below."""


@pytest.mark.cases(ROUNDED)
def test_every_accuracy_keeps_its_error(run: KernelRun):
    inputs, key = run.case.inputs("random"), (run.algorithm, replace(run.case, accuracy="exact"))
    if key not in ERRORS:
        ERRORS[key] = run(inputs).double() - exact_result(inputs.x, inputs.weight, inputs.bias)
    assert rms(ERRORS[key]) <= rounded_allowance(*vars(inputs).values(), run.case.accuracy)


@pytest.mark.cases([OpCase(op=op, M=m, N=20, K=100, bits=3, bias=True) for op in CASES for m in (1, 5)])
def test_the_accuracy_asked_for_never_reaches_a_kernel(run: KernelRun, monkeypatch: pytest.MonkeyPatch):
    """The same operator, the same arguments: so one launch serves the cases of all accuracies above."""
    started: list[tuple[Any, ...]] = []
    operator = getattr(launch, run.case.op)
    monkeypatch.setattr(launch, run.case.op, lambda *given: started.append(given) or operator(*given))
    inputs = run.case.inputs()
    results = [replace(run, case=replace(run.case, accuracy=accuracy))(inputs) for accuracy in ACCURACIES]
    first, *others = [[a.data_ptr() if isinstance(a, Tensor) else a for a in given] for given in started]
    assert others == [first] * (len(ACCURACIES) - 1)
    for y in results[1:]:
        assert_equal(y, results[0], str(run))


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
    names = [name for name in backend.BACKEND.algorithms[case.op] if name != "dequantize"]
    return [(name, backend.task_of(case.problem("cpu"), name)) for name in names]


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


@pytest.mark.parametrize("indices", [siblings.MOST_INDICES, 1])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_siblings_with_codebooks_of_their_own_are_what_each_is_alone(
    count: int, indices: int, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit, rows that end within a block of the kernels included. indices: 1 has them computed one by one."""
    monkeypatch.setattr(siblings, "MOST_INDICES", indices)
    base = OpCase(op="codebook_linear", M=3, K=100, num_codebooks=2, bias=True)
    cases = [replace(base, N=n, seed=n).inputs("exact") for n in (37, 20, 5, 33)[:count]]
    records = [case.weight.tensors for case in cases]
    stacked = [
        torch.cat([t[name] for t in records], dim) for name, dim in (("codes", 1), ("codebooks", 0), ("scales", 0))
    ]
    bias, x = torch.cat([case.bias for case in cases if case.bias is not None]), cases[0].x
    ends = torch.tensor([case.weight.shape[0] for case in cases]).cumsum(0).tolist()
    expected = torch.cat([exact_result(x, case.weight, case.bias) for case in cases], 1).float()
    for algorithm, cut in (("codegemm", [2, 32, 4, 2, 2, 4, 1]), ("dequant_gemm", [16, 32, 16, 1, 2, 4, 1])):
        y = siblings.codebook_siblings(x, *stacked, bias, 32, algorithm, cut, ends)
        assert_equal(y, expected, algorithm)


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
        monkeypatch.setattr(start, "PANEL_BYTES", 7 * 4 * 100)
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


@pytest.mark.parametrize("op", CASES)
def test_operators_that_torch_compile_sees_through_give_the_same_bits_and_gradients(
    op: str, monkeypatch: pytest.MonkeyPatch
):
    """As they are traced for a GPU, but run here one by one: see test_triton_traced.py for the kernels in the graph."""
    case = OpCase(op=op, M=600, N=20, K=72, bits=3, bias=True)
    inputs = case.inputs("exact")
    inputs.weight.scales.requires_grad_()
    graphs = []
    torch._dynamo.reset()

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if "lutgemm" in str(node.target)])
        return graph

    call = partial(lutgemm.ops.linear, weight=inputs.weight, bias=inputs.bias, backend="triton")
    monkeypatch.setattr(
        lutgemm.ops, "_operators", lambda x: traced if torch.compiler.is_compiling() else torch.ops.lutgemm
    )
    compiled = torch.compile(call, backend=keep, fullgraph=True)
    for m in (3, 1, 7, 8, 600):
        grads = []
        for function in (call, compiled):
            x = inputs.x[:m].clone().requires_grad_()
            y = function(x)
            assert_equal(y, exact_result(inputs.x[:m], inputs.weight, inputs.bias).float(), f"{m}")
            grads.append(torch.autograd.grad(y.sum(), (x, inputs.weight.scales)))
        for eager, own in zip(*grads, strict=True):
            assert_equal(own, eager, f"{m}")
    assert graphs == [[f"lutgemm._triton_{op}"]] * 4


def test_compiled_code_gives_the_same_bits():
    """The op of the package stays one call in a compiled graph; what it calls is eager."""
    inputs = OpCase(M=3, N=65, K=100, bits=3, bias=True).inputs()
    eager = lutgemm.bcq_linear(inputs.x, inputs.weight, inputs.bias, backend="triton") * 2

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: Tensor, bias: Tensor) -> Tensor:
        return lutgemm.bcq_linear(x, inputs.weight, bias, backend="triton") * 2

    assert_equal(compiled(inputs.x, inputs.bias), eager)


@pytest.mark.parametrize("op", CASES)
def test_tuning_runs_what_calls_run(op: str):
    """With a clock of its own: which of the candidates is the fastest only a GPU can say."""
    case = OpCase(op=op, N=20, K=72, group_size=32, dtype="float16")
    called: list[Tensor] = []
    found = tuning.tune_triton([case], (1, 2, 16), timer=lambda call: called.append(call()) or 1.0, save=False)
    names = {"bcq_linear": ("lut_gemm", "biqgemm"), "codebook_linear": ("codegemm",)}[op]
    assert {task.algorithm for task in found} == {*names, "dequant_gemm"}
    assert [tuple(y.shape) for y in called] == [(task.M, 20) for task in found]
    for task, cut in found.items():
        assert task == backend.task_of(case.problem("cpu")._replace(M=task.M), task.algorithm)
        assert cut in config.candidates(task, backend.device_of(None))


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


@pytest.mark.parametrize("op", CASES)
def test_operators_keep_what_their_schemas_and_fakes_say(op: str):
    inputs = OpCase(op=op, M=3, N=20, K=72, bias=True).inputs()
    t, config = inputs.weight.tensors, list(Config(4, 32, 1, 4, 1, 4, 1))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    codes, scales = t["codes"], t["scales"].requires_grad_()
    if op == "bcq_linear":
        record = (codes, scales, t["offsets"], None, None, inputs.bias, 32, "free", "biqgemm")
    else:
        record = (codes, t["codebooks"], scales, inputs.bias, 32, "codegemm")
    operator = getattr(torch.ops.lutgemm, f"_triton_{op}").default
    torch.library.opcheck(operator, (inputs.x.requires_grad_(), *record, config), test_utils=checks)
