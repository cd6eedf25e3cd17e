"""Who computes: explicit choices run or raise with the reason, "auto" falls back and says so once, all is cached."""

import dataclasses
import importlib
import os
import subprocess
import sys
import warnings

import pytest
import torch

import lutgemm
from lutgemm.backends import Backend, Problem, cpu, reference
from lutgemm.errors import ArgumentError, BackendError
from lutgemm.testing.cases import CASES, OpCase

backends = importlib.import_module("lutgemm.backends")
"""The module; `lutgemm.backends` is the function of that name."""

PROBLEM = Problem("bcq_linear", "cpu", torch.float32, 1, 20, 72, 32, 2, "free")


@pytest.fixture
def register(monkeypatch):
    """`register(backend, ...)`: for this test these backends come before `reference`, which stays."""

    def put(*added: Backend) -> None:
        chosen = {backend.name: backend for backend in (*added, reference.BACKEND)}
        monkeypatch.setattr(backends, "_registry", lambda: chosen)
        clear()

    def clear() -> None:
        for cached in (backends.registry, backends.select, backends._warn_slow):
            cached.cache_clear()

    yield put
    monkeypatch.undo()
    clear()


def fake_backend(name: str = "fast", **changes) -> Backend:
    """A backend that computes as the reference does, times -1 so that its results are told apart."""

    def negated(kernel):
        return lambda *args: -kernel(*args)

    ours = dataclasses.replace(
        reference.BACKEND,
        name=name,
        device_types=("cpu",),
        bcq_linear=negated(reference.BACKEND.bcq_linear),
        codebook_linear=negated(reference.BACKEND.codebook_linear),
    )
    return dataclasses.replace(ours, **changes)


def test_backends_lists_each_with_a_reason_or_none():
    listed = lutgemm.backends()
    assert list(listed) == list(backends.registry())
    assert list(listed)[-1] == "reference"
    assert listed["reference"] is None
    for reason in listed.values():
        assert reason is None or (isinstance(reason, str) and reason)


@pytest.mark.parametrize("op", CASES)
def test_an_explicit_choice_runs(op):
    inputs = OpCase(op=op).inputs("exact")
    outputs = []
    for name, reason in lutgemm.backends().items():
        for algorithm in ("auto", *backends.registry()[name].algorithms[op]):
            if reason is None:
                choice = {"backend": name, "algorithm": algorithm, "accuracy": "exact"}
                outputs.append(lutgemm.ops.linear(inputs.x, inputs.weight, **choice))
    assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_an_absent_backend_raises_its_reason(register):
    register(fake_backend(unavailable=lambda: "no such device in this machine"))
    inputs = OpCase().inputs()
    with pytest.raises(BackendError, match=r"backend='fast', algorithm='auto' cannot run .*: fast: no such device"):
        lutgemm.bcq_linear(inputs.x, inputs.weight, backend="fast")
    assert lutgemm.backends() == {"fast": "no such device in this machine", "reference": None}


def test_an_unsupported_problem_raises_its_reason(register):
    register(
        fake_backend(unsupported=lambda problem, algorithm: f"{algorithm} takes M <= 1" if problem.M > 1 else None)
    )
    inputs = OpCase(M=2).inputs()
    with pytest.raises(BackendError, match="fast: lut_gemm takes M <= 1"):
        lutgemm.bcq_linear(inputs.x, inputs.weight, backend="fast", algorithm="lut_gemm")
    one = lutgemm.bcq_linear(inputs.x[:1], inputs.weight, backend="fast", algorithm="lut_gemm")
    assert torch.equal(one, -lutgemm.bcq_linear(inputs.x[:1], inputs.weight, backend="reference", algorithm="lut_gemm"))


def test_an_algorithm_that_the_backend_lacks_raises_what_it_offers(register):
    only = {"bcq_linear": ("dequantize",), "codebook_linear": ("dequantize",)}
    register(fake_backend(algorithms=only))
    inputs = OpCase().inputs()
    with pytest.raises(BackendError, match=r"fast: it offers the algorithms \['dequantize'\] for bcq_linear"):
        lutgemm.bcq_linear(inputs.x, inputs.weight, backend="fast", algorithm="biqgemm")
    with pytest.warns(RuntimeWarning, match="'fast' was passed over because it offers the algorithms"):
        lutgemm.bcq_linear(inputs.x, inputs.weight, algorithm="biqgemm")


def test_a_device_that_the_backend_lacks_raises(register):
    register(fake_backend(device_types=("cuda",)))
    inputs = OpCase().inputs()
    with pytest.raises(BackendError, match="fast: it runs on cuda, and x is on cpu"):
        lutgemm.bcq_linear(inputs.x, inputs.weight, backend="fast")


def test_a_meta_tensor_reaches_no_kernel():
    with pytest.raises(BackendError, match="cpu: "):
        backends.select(PROBLEM._replace(device="meta"), "cpu")


def test_auto_takes_the_first_that_can(register):
    register(fake_backend("first", unsupported=lambda p, a: "too big" if p.N > 8 else None), fake_backend("second"))
    assert backends.select(PROBLEM)[0].name == "second"
    assert backends.select(PROBLEM._replace(N=8))[0].name == "first"


def test_auto_falls_back_to_the_reference_and_warns_once(register):
    register(fake_backend(unavailable=lambda: "not built"))
    inputs = OpCase().inputs()
    with pytest.warns(RuntimeWarning, match=r"slow PyTorch reference: backend 'fast' .* not built\. `lutgemm env`"):
        y = lutgemm.bcq_linear(inputs.x, inputs.weight)
    assert torch.equal(y, lutgemm.bcq_linear(inputs.x, inputs.weight, backend="reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lutgemm.bcq_linear(inputs.x, inputs.weight)
        lutgemm.bcq_linear(inputs.x[:2], inputs.weight)


def test_a_setting_that_cannot_be_obeyed_is_an_error_for_auto_too(register):
    register(fake_backend(misconfigured=lambda: "FAST=yes is unknown; use on or off"))
    inputs = OpCase().inputs()
    for name in ("auto", "fast"):
        with pytest.raises(BackendError, match="FAST=yes is unknown; use on or off"):
            lutgemm.bcq_linear(inputs.x, inputs.weight, backend=name)
    lutgemm.bcq_linear(inputs.x, inputs.weight, backend="reference")
    with pytest.warns(RuntimeWarning, match="it runs on cpu, and x is on meta"):
        assert backends.select(PROBLEM._replace(device="meta"))[0].name == "reference"


def test_naming_the_reference_does_not_warn(register):
    register(fake_backend(unavailable=lambda: "not built"))
    inputs = OpCase().inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lutgemm.bcq_linear(inputs.x, inputs.weight, backend="reference")


def test_choices_are_cached_per_problem(register):
    asked = []

    def unsupported(problem: Problem, algorithm: str) -> None:
        asked.append((problem.M, algorithm))

    register(fake_backend(unsupported=unsupported, choose=lambda p: "lut_gemm" if p.M == 1 else "dequantize"))
    inputs = OpCase(M=3).inputs()
    for _ in range(3):
        lutgemm.bcq_linear(inputs.x, inputs.weight)
        lutgemm.bcq_linear(inputs.x[:1], inputs.weight)
    assert asked == [(3, "dequantize"), (1, "lut_gemm")]


def test_auto_runs_what_choose_says(register):
    register(fake_backend(choose=lambda problem: "biqgemm"))
    assert backends.select(PROBLEM)[1] == "biqgemm"
    assert backends.select(PROBLEM, algorithm="lut_gemm")[1] == "lut_gemm"


def test_an_error_inside_a_kernel_propagates(register):
    def broken(*_):
        raise RuntimeError("kernel failed")

    register(fake_backend(bcq_linear=broken))
    inputs = OpCase().inputs()
    with pytest.raises(RuntimeError, match="kernel failed"):
        lutgemm.bcq_linear(inputs.x, inputs.weight)


@pytest.mark.parametrize("op", CASES)
def test_unknown_names_list_the_known_ones(op):
    problem = PROBLEM._replace(op=op)
    with pytest.raises(ArgumentError, match=r"backend='gpu' is unknown; use 'auto' or one of \[.*'reference'\]"):
        backends.select(problem, "gpu")
    with pytest.raises(ArgumentError, match=r"algorithm='fft' is unknown for \w+_linear; use 'auto' or one of .*'dequ"):
        backends.select(problem, "cpu", "fft")


ASK_EACH = """
import lutgemm
from lutgemm.testing.cases import CASES, OpCase
for op in CASES:
    inputs = OpCase(op=op).inputs()
    for backend in ("auto", "cpu", "reference"):
        try:
            lutgemm.ops.linear(inputs.x, inputs.weight, backend=backend)
            print(backend, "ran")
        except lutgemm.BackendError as error:
            print(backend, error)
print("listed", lutgemm.backends()["cpu"])
"""
"""Each line: who was asked, and "ran" or the error; then what `backends()` says of cpu."""


def ask_each(**environment: str) -> list[tuple[str, str]]:
    ran = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", ASK_EACH],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in ran.stdout.splitlines()]


@pytest.mark.skipif(cpu.BACKEND.unavailable() is not None, reason=f"backend cpu: {cpu.BACKEND.unavailable()}")
def test_the_environment_names_the_instruction_set():
    assert set(ask_each(LUTGEMM_CPU_ISA="scalar")) == {
        ("auto", "ran"),
        ("cpu", "ran"),
        ("reference", "ran"),
        ("listed", "None"),
    }


def test_an_instruction_set_that_nobody_has_is_an_error_and_no_fall_back():
    for asked, answer in ask_each(LUTGEMM_CPU_ISA="sse9"):
        if asked == "reference":
            assert answer == "ran"
        elif asked != "listed" or cpu.available_isas():
            assert answer == f"LUTGEMM_CPU_ISA='sse9' is unknown; use one of {list(cpu.ISAS)} or unset it"


def test_an_instruction_set_that_is_absent_is_an_error(monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, "avx512")
    for reason, isas, message in (
        (None, ("scalar", "avx2"), r"='avx512', but this CPU has \['scalar', 'avx2'\]; use one of these or unset it"),
        ("no compiler", (), r"='avx512', but there are no compiled kernels \(no compiler\); build them or unset it"),
    ):
        monkeypatch.setattr(cpu._native, "load_ops", lambda name, reason=reason: reason)
        monkeypatch.setattr(cpu, "available_isas", lambda isas=isas: isas)
        cpu._environment_isa.cache_clear()
        backends.select.cache_clear()
        try:
            with pytest.raises(BackendError, match=cpu.ISA_VARIABLE + message):
                backends.select(PROBLEM)
        finally:
            cpu._environment_isa.cache_clear()
            backends.select.cache_clear()
