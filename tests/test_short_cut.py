"""Calls that need nothing of torch's dispatcher go past it; every other one must be seen by who looks on."""

import dataclasses
import sys
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lutgemm
from lutgemm import choices, ops
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
    kept = layer.weight_record.choices
    assert sorted(key[0] for key in kept) == [(1, 72), (4, 72)]
    layer.accuracy = "exact"
    with torch.no_grad():
        layer(torch.zeros(1, 72))
    assert len(kept) == 3
    forget_choices()
    with torch.no_grad():
        layer(torch.zeros(1, 72))
    assert len(kept) == 4
    with pytest.raises(lutgemm.ArgumentError, match="accuracy='best' is unknown"), torch.no_grad():
        linear(X, layer.weight_record, accuracy="best")


def test_a_choice_is_of_an_instruction_set(layer, monkeypatch):
    chosen = {"scalar": "dequantize"}
    own = "lut_gemm" if layer.format == "bcq" else "codegemm"
    backend = dataclasses.replace(cpu.BACKEND, choose=lambda problem: chosen.get(cpu.isa(), own))
    monkeypatch.setattr(sys.modules["lutgemm.backends"], "registry", lambda: {"cpu": backend})
    forget_choices()
    choose = getattr(choices, f"{layer.format}_choice")
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


# Calls that are kept ready: the second of a kind goes straight to the C++ operator.

compiled = pytest.mark.skipif(cpu.BACKEND.unavailable() is not None, reason=f"backend cpu: {cpu.BACKEND.unavailable()}")


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the functions of the cpu backend."""
    seen: list[str] = []
    backend = cpu.BACKEND
    changes = {}
    for name in ("bcq_linear", "codebook_linear"):
        function = getattr(backend, name)
        changes[name] = lambda *arguments, name=name, function=function: seen.append(name) or function(*arguments)
    watched = dataclasses.replace(backend, **changes)
    monkeypatch.setattr(sys.modules["lutgemm.backends"], "registry", lambda: {"cpu": watched})
    forget_choices()
    yield seen
    forget_choices()


@compiled
def test_the_second_call_of_a_kind_goes_to_the_operator(layer, kernel_calls):
    xs = [X, X[:1], X[None], X.bfloat16()]
    for x in xs:
        layer.bias = torch.nn.Parameter(layer.bias.detach().to(x.dtype), requires_grad=False)
        first = layer(x)
        calls = len(kernel_calls)
        with torch.inference_mode():
            assert torch.equal(layer(x), first)
            assert torch.equal(linear(x, layer.weight_record, layer.bias), first)
        assert torch.equal(layer(x.flip(0).flip(0)), first)
        assert len(kernel_calls) == calls
    assert len(kernel_calls) == len(xs)
    layer.accuracy = "fast"
    layer(X.bfloat16())
    assert len(kernel_calls) == len(xs) + 1
    with torch.no_grad():
        layer.scales.mul_(1)
    layer(X.bfloat16())
    assert len(kernel_calls) == len(xs) + 2


@compiled
def test_memory_that_is_not_contiguous(layer):
    expected = layer(X)
    wide = torch.stack([X, X], -1)[..., 0]
    assert not wide.is_contiguous()
    for _ in range(3):
        assert torch.equal(layer(wide), expected)
    layer.bias = torch.nn.Parameter(torch.stack([layer.bias.detach()] * 2, -1)[:, 0], requires_grad=False)
    assert not layer.bias.is_contiguous()
    for _ in range(3):
        assert torch.equal(layer(X), expected)


@compiled
def test_a_ready_call_refuses_what_the_first_one_does(layer):
    weight, bias = layer.weight_record, layer.bias
    for _ in range(2):
        linear(X, weight, bias)
    for wrong, message in (
        (torch.zeros(19), r"bias: got torch.float32 \[19\]"),
        (torch.zeros(20, 1), r"bias: got torch.float32 \[20, 1\]"),
        (torch.zeros(20, dtype=torch.float16), "bias: got torch.float16"),
        (torch.zeros(20, device="meta"), "bias: got .* on meta"),
    ):
        with pytest.raises(lutgemm.ArgumentError, match=message):
            linear(X, weight, wrong)
    with pytest.raises(lutgemm.ArgumentError, match="x is on meta"):
        linear(X.to("meta"), weight, bias)
    with pytest.raises(lutgemm.ArgumentError, match="takes a"):
        (lutgemm.codebook_linear if layer.format == "bcq" else lutgemm.bcq_linear)(X, weight, bias)


@compiled
def test_an_error_of_the_operator_is_not_hidden(layer, monkeypatch):
    layer(X)
    (choice,) = layer.weight_record.choices.values()

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no more memory")

    choice.ready.operator = broken
    with pytest.raises(RuntimeError, match="no more memory"):
        layer(X)


@compiled
def test_tensors_that_were_replaced_or_changed_are_seen_by_ready_calls(layer):
    def fresh() -> torch.Tensor:
        with torch.inference_mode(False):
            tensors = {name: t.detach().clone() for name, t in layer.weight_record.tensors.items()}
            return linear(X, type(layer.weight_record)(layer.layout, tensors), layer.bias)

    for mode in (torch.no_grad, torch.inference_mode):
        layer(X), layer(X)
        with mode():
            layer.scales.mul_(2)
            assert torch.equal(layer(X), fresh())
            assert torch.equal(layer(X), fresh())
    layer.scales = torch.nn.Parameter(layer.scales.detach() * 2, requires_grad=False)
    assert torch.equal(layer(X), fresh())
    layer.codes = layer.codes.flip(1)
    assert torch.equal(layer(X), fresh())
    layer.scales.data = layer.scales.data * 2
    assert torch.equal(layer(X), fresh())
    layer.scales.data.mul_(2)
    layer.weight_record.repack()
    assert torch.equal(layer(X), fresh())
    layer.scales.requires_grad_(True)
    assert layer(X).requires_grad
    del layer.scales
    with pytest.raises((KeyError, AttributeError)):
        layer(X)


@compiled
def test_ready_calls_keep_no_layout(layer):
    layer(X)
    (choice,) = layer.weight_record.choices.values()
    gone = weakref.ref(choice.ready.layout(layer._parameters, layer._buffers))
    assert gone() is not None
    layer.weight_record.repack()
    assert gone() is None
    assert choice.ready.layout(layer._parameters, layer._buffers) is None
    layer(X)
    assert choice.ready.layout(layer._parameters, layer._buffers) is not None


def test_a_weight_keeps_no_more_choices_than_some(layer, monkeypatch):
    monkeypatch.setattr(choices, "MOST_CHOICES", 3)
    for m in range(1, 9):
        layer(torch.zeros(m, 72))
        assert len(layer.weight_record.choices) <= 3
