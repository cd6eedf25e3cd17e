"""Calls that need nothing of torch's dispatcher go past it; every other one must be seen by who looks on."""

import dataclasses
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lutgemm
from lutgemm import ops
from lutgemm.backends import cpu, forget_choices
from lutgemm.nn import QuantizedLinear
from lutgemm.ops import linear
from lutgemm.testing.cases import CASES, OpCase

X = torch.randn(4, 72, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CASES)
def layer(request: pytest.FixtureRequest) -> QuantizedLinear:
    inputs = OpCase(op=request.param, bias=True, scale_dtype="float32").inputs()
    return QuantizedLinear.from_weight(inputs.weight, inputs.bias)


@pytest.fixture
def past(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call, whether it went past the dispatcher."""
    seen, direct = [], ops.direct
    monkeypatch.setattr(ops, "direct", lambda *arguments: seen.append(direct(*arguments)) or seen[-1])
    return seen


def op_of(layer: QuantizedLinear) -> torch._ops.OpOverload:
    return getattr(torch.ops.lutgemm, f"{layer.format}_linear").default


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


class Logged(torch.Tensor):
    """A subclass whose operations are recorded."""

    log: list[object] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.log.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("m", [0, 1, 4, 100])
@pytest.mark.parametrize("accuracy", ["auto", "exact"])
def test_both_ways_give_the_same_bits(layer, past, m, accuracy):
    x = torch.randn(m, 72)
    for shape in ((m, 72), (1, m, 72)):
        with torch.no_grad():
            y = linear(x.view(shape), layer.weight_record, layer.bias, accuracy=accuracy)
            with Seen() as seen:
                z = linear(x.view(shape), layer.weight_record, layer.bias, accuracy=accuracy)
        assert torch.equal(y, z)
        assert (y.shape, y.stride(), y.dtype) == (z.shape, z.stride(), z.dtype)
        assert op_of(layer) in seen.ops
    assert past == [True, False] * 2


def test_what_needs_a_gradient_is_recorded(layer, past):
    x = X.clone().requires_grad_()
    layer.bias.requires_grad_(True)
    assert layer(X).grad_fn is not None
    layer.requires_grad_(False)
    assert layer(x).grad_fn is not None
    assert not layer(X).requires_grad
    layer.scales.requires_grad_(True)
    assert layer(X).grad_fn is not None
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()
    assert past == [False, False, True, False, True, True]


def test_modes_see_the_operator(layer, past):
    with torch.no_grad():
        with Seen() as seen:
            layer(X)
        assert seen.ops == [op_of(layer)]
        with SeenFunctions() as functions:
            layer(X)
        assert any("lutgemm" in str(function) for function in functions.functions)
    assert past == [False, False]


def test_subclasses_see_the_operator(layer):
    Logged.log.clear()
    with torch.no_grad():
        y = layer(X.as_subclass(Logged))
    assert type(y) is Logged
    assert any("lutgemm" in str(function) for function in Logged.log)


def test_fake_tensors(layer):
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(X))
        assert isinstance(y, FakeTensor)
        assert y.shape == (4, 20)


def test_traced_graphs_hold_the_operator(layer):
    with torch.no_grad():
        graph = make_fx(layer)(X)
        assert op_of(layer) in [node.target for node in graph.graph.nodes]
        assert torch.equal(graph(X + 1), layer(X + 1))


def test_functorch(layer, past):
    layer.requires_grad_(False)
    layer.accuracy = "exact"
    expected = layer(X)
    torch.testing.assert_close(torch.func.vmap(layer)(X), expected)
    x = torch.stack([X, 2 * X])
    torch.testing.assert_close(torch.func.vmap(layer, in_dims=0)(x)[0], expected)
    y = torch.func.functional_call(layer, {"bias": layer.bias * 2}, (X,))
    torch.testing.assert_close(y - layer.bias, expected)
    with pytest.raises(RuntimeError, match="functorch"):  # torch.library's autograd formulas do not nest
        torch.func.grad(lambda v: layer(v).square().sum())(X)
    assert past == [True, False, False, True, False]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")
def test_jit_traces_hold_an_operator(layer):
    with torch.no_grad():
        traced = torch.jit.trace(layer, X, check_trace=False)
        assert "lutgemm::" in str(traced.graph)
        torch.testing.assert_close(traced(X + 1), layer(X + 1))


def test_autocast_without_gradients(layer, past):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(X).dtype == torch.bfloat16
    assert past == [True]


def test_choices_are_kept_for_few_tokens_only(layer):
    with torch.no_grad():
        for m in (1, 4, 1000):
            layer(torch.zeros(m, 72))
    choices = layer.weight_record.choices
    assert sorted(key[0] for key in choices) == [(1, 72), (4, 72)]
    layer.accuracy = "exact"
    with torch.no_grad():
        layer(torch.zeros(1, 72))
    assert len(choices) == 3
    forget_choices()
    with torch.no_grad():
        layer(torch.zeros(1, 72))
    assert len(choices) == 4
    with pytest.raises(lutgemm.ArgumentError, match="accuracy='best' is unknown"), torch.no_grad():
        linear(X, layer.weight_record, accuracy="best")


def test_a_choice_is_of_an_instruction_set(layer, monkeypatch):
    chosen = {"scalar": "dequantize"}
    own = "lut_gemm" if layer.format == "bcq" else "codegemm"
    backend = dataclasses.replace(cpu.BACKEND, choose=lambda problem: chosen.get(cpu.isa(), own))
    monkeypatch.setattr(sys.modules["lutgemm.backends"], "registry", lambda: {"cpu": backend})
    forget_choices()
    choose = getattr(ops, f"{layer.format}_choice")
    picked = []
    for m in (1, 1000):
        for isa in ("scalar", cpu.available_isas()[-1], "scalar"):
            with cpu.use_isa(isa):
                picked.append(choose(torch.zeros(m, 72), layer.weight_record, "auto", "auto", "auto").algorithm)
    forget_choices()
    assert picked == ["dequantize", own, "dequantize"] * 2


def test_a_wrong_argument_is_refused_on_both_ways(layer):
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), pytest.raises(lutgemm.ArgumentError, match=r"x: got shape \[4, 71\]"):
            layer(X[:, :71])
