"""Siblings in graphs of torch.compile, with the CUDA kernels under the emulator, on CPU tensors. Needs g++."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sibling_models import BCQ, CODEBOOK, RATIO, UNIFORM, close, siblings
from torch import fx, nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

from lutgemm import compiled_fusion
from lutgemm.backends import gpu_siblings
from lutgemm.fusion import compile_options
from lutgemm.nn import set_accuracy

pytest_plugins = ["emulated_siblings"]
pytestmark = pytest.mark.usefixtures("one_multiprocessor")

ALL = 70 + 20 + 33


class Compiled:
    """torch.compile without code generation: the graph that Inductor would get, joined, run node by node."""

    def __init__(self, model: nn.Module, dynamic: bool | None = False) -> None:
        torch._dynamo.reset()
        self.joined: list[int] = []
        """How many groups there were in each graph."""
        self.run = torch.compile(model, backend=self._backend, fullgraph=True, dynamic=dynamic)

    def _backend(self, graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        return aot_module_simplified(graph, examples, fw_compiler=self._compile)

    def _compile(self, graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        self.joined.append(compiled_fusion.join(graph.graph))
        graph.graph.lint()
        graph.recompile()
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.clone.default:
                assert node.meta["val"].is_contiguous()
        return make_boxed_func(graph.forward)


@pytest.mark.parametrize(("config", "bias", "m"), [(BCQ, True, 6), (UNIFORM, False, 1)])
def test_siblings_become_one_call(config, bias, m, rows):
    model = siblings(config, bias)[0]
    compiled = Compiled(model)
    with torch.no_grad():
        x = torch.randn(m, 1, 96)
        y = compiled.run(x)
        assert close(y, model(x))
        model.k_proj.scales.mul_(2)
        changed = compiled.run(x)
        assert close(changed, model(x))
        assert not torch.equal(changed, y)
    assert set(compiled.joined) == {1}
    assert rows == [ALL] * 2


@pytest.mark.parametrize("shared", [False, True])
def test_codebooks(shared, emulated, rows):
    """The graph does not say that codebooks have the same values, and kernels may take no others together."""
    model = siblings(CODEBOOK, True, shared, (64, 32, 33))[0]
    engine = gpu_siblings.engines()[emulated.backend.codebook_linear]
    stacked = engine.takes_own_codebooks("codegemm", (64, 32, 33))
    compiled = Compiled(model)
    with torch.no_grad():
        x = torch.randn(2, 96)
        assert close(compiled.run(x), model(x))
    assert compiled.joined == [stacked]
    assert rows == [129] * stacked


class Block(nn.Module):
    """What reads x in another way, x changed in place, and siblings that were called before."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.a = attention

    def forward(self, x: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = self.a.q_proj(query)
        k = self.a.k_proj(x)
        x.mul_(2)
        v, again = self.a.v_proj(x), self.a.k_proj(x)
        return q, k.view(2, -1), v.flatten(), again


def test_only_the_same_activations_are_read_together(rows):
    model = Block(siblings(BCQ)[0])
    compiled = Compiled(model)
    x, query = torch.randn(2, 4, 96)
    given = x.clone()
    with torch.no_grad():
        expected = model(x, query)
        ys = compiled.run(given, query)
    assert all(map(close, ys, expected))
    assert torch.equal(given, x)
    assert compiled.joined == [1]
    assert rows == [20 + 33]


def test_what_is_chosen_when_it_runs_is_left_alone(rows):
    model = siblings(BCQ)[0]
    compiled = Compiled(model, dynamic=True)
    with torch.no_grad():
        x = torch.randn(5, 96)
        assert close(compiled.run(x), model(x))
        set_accuracy(model, "exact")
        other = Compiled(model)
        x = torch.randn(20, 96)
        assert close(other.run(x), model(x))  # by "dequantize"
        model.k_proj.accuracy = "auto"
        mixed = Compiled(model)
        assert close(mixed.run(x[:1]), model(x[:1]))
    assert set(compiled.joined) == set(other.joined) == {0}
    assert mixed.joined == [1]
    assert rows == [70 + 33]


def test_a_call_that_cannot_be_joined_any_more_runs_apart(rows, change_engine):
    model = siblings(RATIO)[0]
    compiled = Compiled(model)
    x = torch.randn(3, 96)
    with torch.no_grad():
        compiled.run(x)
        model.k_proj.ratios.mul_(2)
        for _ in range(2):
            assert close(compiled.run(x), model(x))
        model.q_proj.scales.mul_(2)
        change_engine(place_of=lambda x: -1)  # a capture: no layout can be made
        assert close(compiled.run(x), model(x))
    assert rows == [ALL]


def test_gradients(rows):
    model = siblings(BCQ, True)[0]
    model.q_proj.scales.requires_grad_(True)
    model.v_proj.bias.requires_grad_(True)
    compiled = Compiled(model)
    x = torch.randn(3, 96)
    wanted = (model.q_proj.scales, model.v_proj.bias)
    grads = torch.autograd.grad(compiled.run(x).square().sum(), wanted)
    assert all(map(close, grads, torch.autograd.grad(model(x).square().sum(), wanted)))
    assert rows == [ALL]


def test_inductor_takes_the_options(rows):
    torch._dynamo.reset()
    model = siblings(BCQ, True)[0]
    layers = [model.q_proj, model.k_proj, model.v_proj]
    run = torch.compile(lambda x: [layer(x) for layer in layers], options=compile_options(), fullgraph=True)
    x = torch.randn(1, 1, 96)
    with torch.no_grad():
        for y, layer in zip(run(x), layers, strict=True):
            assert close(y, layer(x))
    assert rows == [ALL]


def test_the_operators_are_well_behaved():
    for config, op, names in (
        (BCQ, torch.ops.lutgemm.bcq_linear_siblings, ("codes", "scales", "offsets", "zeros", "ratios", "bias")),
        (CODEBOOK, torch.ops.lutgemm.codebook_linear_siblings, ("codes", "codebooks", "scales", "bias")),
    ):
        layers = list(siblings(config, True)[0].children())
        lists = [[t for layer in layers if (t := getattr(layer, name, None)) is not None] for name in names]
        kind = (32, "free") if config is BCQ else (32,)
        arguments = (torch.randn(3, 96), *lists, *kind, "auto", "auto", "auto")
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        y = op(*arguments)
        assert y.is_contiguous()
        assert close(y, torch.cat([layer(arguments[0]) for layer in layers], -1).detach())
