"""torch.compile sees Triton's kernels through public functions and layers: traced for a GPU that is not there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lutgemm
from lutgemm import ops
from lutgemm.backends import cuda, forget_choices, registry, select
from lutgemm.backends import triton as backend
from lutgemm.nn import QuantizedLinear
from lutgemm.testing.cases import CASES, OpCase

pytestmark = pytest.mark.skipif(
    backend.missing() is not None or backend.INTERPRETED,
    reason=f"backend triton: {backend.missing() or 'TRITON_INTERPRET is set, so kernels cannot be traced'}",
)

N, K = 65, 1024
FUNCTIONS = {"bcq_linear": lutgemm.bcq_linear, "codebook_linear": lutgemm.codebook_linear}
Graph = list[str]


def calls(graph: torch.fx.GraphModule) -> Graph:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


class Recorder:
    """A compiler that keeps graphs: as Dynamo made them, and what AOTAutograd made of them for Inductor."""

    def __init__(self) -> None:
        self.traced: list[torch.fx.GraphModule] = []
        self.forward: list[Graph] = []
        self.backward: list[Graph] = []

    def _keep(self, kept: list[Graph]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func

        def keep(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            kept.append(calls(graph))
            return make_boxed_func(graph.forward)

        return keep

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        self.traced.append(graph)
        made = aot_autograd(fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward))
        return made(graph, inputs)

    def chosen(self) -> tuple[str, list[int]]:
        """The algorithm and configuration in the last graph."""
        nodes = [n for n in self.traced[-1].graph.nodes if str(n.target).startswith("lutgemm._triton")]
        assert len(nodes) == 1, calls(self.traced[-1])
        return nodes[0].args[-2], list(nodes[0].args[-1])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stands for a GPU that only has a name, which is all that tracing asks for."""
    import triton
    from triton.backends.compiler import GPUTarget

    from lutgemm.kernels.config import Device

    class Named:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(triton.runtime.driver, "_active", Named())
    monkeypatch.setattr(backend, "BACKEND", replace(backend.BACKEND, unavailable=lambda: None))
    monkeypatch.setattr(cuda, "BACKEND", replace(cuda.BACKEND, unavailable=lambda: "the test says so"))
    monkeypatch.setattr(backend, "device_of", lambda index: Device())
    forget()
    yield
    monkeypatch.undo()
    forget()


def forget() -> None:
    registry.cache_clear()
    forget_choices()
    backend._config.cache_clear()
    torch._dynamo.reset()


MODE = FakeTensorMode()


def fake(t: Tensor, device: str = "cuda") -> Tensor:
    with MODE:
        return torch.empty(t.shape, dtype=t.dtype, device=device)


def layer_of(op: str, device: str = "cuda", train: bool = False) -> QuantizedLinear:
    weight = OpCase(op=op, N=N, K=K).weight()
    tensors = {name: fake(t, device) for name, t in weight.tensors.items()}
    with MODE:
        layer = QuantizedLinear.from_weight(type(weight)(weight.layout, tensors), fake(torch.empty(N).half(), device))
    for parameter in layer.parameters():
        parameter.requires_grad_(train)
    assert layer.weight_record is not None
    return layer


def tokens(m: int, device: str = "cuda", train: bool = False) -> Tensor:
    with MODE:
        return torch.empty(m, K, dtype=torch.float16, device=device, requires_grad=train)


def caller(op: str, how: str) -> Callable[[Tensor], Tensor]:
    """A layer, or the function of that op with a backend named `how`."""
    layer = layer_of(op)
    if how == "layer":
        return layer
    return lambda x: FUNCTIONS[op](x * 2, layer.weight_record, layer.bias, backend=how) + 1


@pytest.mark.parametrize("how", ["triton", "auto", "layer"])
@pytest.mark.parametrize("op", CASES)
def test_kernels_are_in_the_graph(op: str, how: str, gpu: None):
    recorder = Recorder()
    with MODE:
        y = torch.compile(caller(op, how), backend=recorder, fullgraph=True)(tokens(3))
    assert (y.shape, y.dtype, y.device.type) == ((3, N), torch.float16, "cuda")
    (graph,) = recorder.forward
    assert sum("triton_kernel_wrapper" in name for name in graph) == 2, graph
    assert not any("lutgemm" in name for name in graph), graph


@pytest.mark.parametrize(("op", "how"), [("bcq_linear", "layer"), ("codebook_linear", "triton")])
def test_each_class_of_m_is_traced_once(op: str, how: str, gpu: None):
    recorder = Recorder()
    compiled = torch.compile(caller(op, how), backend=recorder, fullgraph=True)
    traced = []
    with MODE:
        for m in (3, 1, 7, 5, 40, 9, 64, 2, 4, 100, 512, 600, 8000, 3, 1):
            assert compiled(tokens(m)).shape == (m, N)
            traced.append(len(recorder.traced))
    assert traced == [1, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7]
    assert len(recorder.traced) < torch._dynamo.config.recompile_limit
    for graph in recorder.forward:
        assert any("triton_kernel_wrapper" in name for name in graph), graph
        assert not any("lutgemm" in name for name in graph), graph


@pytest.mark.parametrize("op", CASES)
def test_a_graph_of_one_m_computes_as_an_eager_call_does(op: str, gpu: None):
    """The same algorithm, cut the same way: so the same bits."""
    layer = layer_of(op)
    for m in (1, 3, 17, 1000):
        torch._dynamo.reset()
        recorder = Recorder()
        with MODE:
            torch.compile(layer, backend=recorder, fullgraph=True, dynamic=False)(tokens(m))
        problem = OpCase(op=op, M=m, N=N, K=K, dtype="float16", accuracy="accurate").problem("cuda")
        algorithm = select(problem)[1]
        assert recorder.chosen() == (algorithm, backend.plan(problem, algorithm, 0)[0])


@pytest.mark.parametrize("op", CASES)
def test_classes_of_m_end_where_another_algorithm_begins(op: str):
    from lutgemm import traced

    problem = OpCase(op=op, N=N, K=K, dtype="float16").problem("cuda")
    classes = [1, *traced.CLASSES, traced.MORE]
    for first, last in pairwise(classes):
        found = {backend.BACKEND.choose(problem._replace(M=m)) for m in (first + 1, last)}
        assert len(found) == 1, (first, last, found)


@pytest.mark.parametrize("op", CASES)
def test_sizes_of_a_weight_may_be_symbolic_too(op: str, gpu: None):
    recorder = Recorder()
    compiled = torch.compile(caller(op, "auto"), backend=recorder, fullgraph=True, dynamic=True)
    with MODE:
        for m in (3, 4, 2):
            assert compiled(tokens(m)).shape == (m, N)
    recorder.chosen()
    assert len(recorder.traced) == 1


def test_leading_dimensions_and_explicit_algorithms(gpu: None):
    record = layer_of("bcq_linear").weight_record
    for algorithm in ("lut_gemm", "dequantize"):
        torch._dynamo.reset()
        recorder = Recorder()
        call = partial(lutgemm.bcq_linear, weight=record, backend="triton", algorithm=algorithm, accuracy="exact")
        compiled = torch.compile(call, backend=recorder, fullgraph=True)
        with MODE:
            for m in (6, 12, 16):
                assert compiled(tokens(m).view(2, m // 2, K)).shape == (2, m // 2, N)
                assert recorder.chosen()[0] == algorithm
        assert len(recorder.traced) == 2


def assert_opaque(call: Callable[[Tensor], Tensor], op: str, *sizes: int, **options: Any) -> None:
    """Each graph is one call of the package's operator, and there is one for all M but the first."""
    recorder = Recorder()
    compiled = torch.compile(call, backend=recorder, fullgraph=True, **options)
    with MODE:
        for m in sizes:
            compiled(tokens(m))
    assert len(recorder.traced) <= 2
    for graph in recorder.forward:
        assert [name for name in graph if "lutgemm" in name or "triton" in name] == [f"lutgemm.{op}.default"]


@pytest.mark.parametrize("op", CASES)
def test_other_backends_stay_one_opaque_call(op: str, gpu: None, monkeypatch: pytest.MonkeyPatch):
    assert_opaque(caller(op, "reference"), op, 3, 5, 100)
    able = replace(cuda.BACKEND, unavailable=lambda: None, unsupported=lambda problem, algorithm: None)
    monkeypatch.setattr(cuda, "BACKEND", replace(able, choose=lambda problem: "dequantize"))
    forget()
    assert_opaque(caller(op, "auto"), op, 3, 5, 100)


def test_what_cannot_be_planned_stays_opaque(gpu: None, monkeypatch: pytest.MonkeyPatch):
    from lutgemm.kernels import launch

    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 1)
    assert_opaque(caller("bcq_linear", "triton"), "bcq_linear", 5, 6, dynamic=True)
    forget()
    assert_opaque(caller("bcq_linear", "auto"), "bcq_linear", 0)


def test_wrong_names_are_left_to_the_call_to_refuse(gpu: None):
    record = layer_of("bcq_linear").weight_record
    for wrong in ("backend", "algorithm", "accuracy"):
        torch._dynamo.reset()
        assert_opaque(partial(lutgemm.bcq_linear, weight=record, **{wrong: "none"}), "bcq_linear", 3)


def test_exported_programs_keep_the_public_operator(gpu: None):
    layer = layer_of("bcq_linear")
    for strict in (False, True):
        with MODE:
            program = torch.export.export(layer, (tokens(3),), strict=strict)
        found = [call for call in calls(program.graph_module) if "lutgemm" in call]
        assert found == ["lutgemm.bcq_linear.default"]


@pytest.fixture
def pretended(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU taken for a GPU's: autograd of a torch without CUDA refuses those."""
    from lutgemm import traced

    monkeypatch.setattr(backend, "BACKEND", replace(backend.BACKEND, device_types=("cpu",)))
    monkeypatch.setattr(ops, "_operators", lambda x: traced)
    forget()


@pytest.mark.parametrize("op", CASES)
def test_gradients_reach_x_and_scales_through_the_kernels(op: str, pretended: None):
    recorder = Recorder()
    layer = layer_of(op, "cpu", train=True)
    call = partial(FUNCTIONS[op], weight=layer.weight_record, bias=layer.bias, backend="triton")
    with MODE:
        x = tokens(5, "cpu", train=True)
        torch.compile(call, backend=recorder, fullgraph=True)(x).sum().backward()
    (forward,), (backward,) = recorder.forward, recorder.backward
    assert any("triton_kernel_wrapper" in name for name in forward)
    assert not any("lutgemm" in name for name in forward)
    assert [name for name in backward if "lutgemm" in name] == [f"lutgemm.{op}_backward.default"]
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape


def test_an_m_of_which_nothing_is_known_stays_opaque(pretended: None):
    inputs = OpCase(M=5, N=N, K=K).inputs()
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(calls(graph))
        return graph.forward

    torch._dynamo.decorators.mark_unbacked(inputs.x, 0)
    torch.compile(partial(lutgemm.bcq_linear, weight=inputs.weight), backend=keep, fullgraph=True)(inputs.x)
    assert [name for name in graphs[0] if "lutgemm" in name] == ["lutgemm.bcq_linear"]


def test_the_compiler_s_cache_knows_the_kernels_of_an_operator():
    """Else a graph compiled by an older version of the package would be taken."""
    from torch._library.triton import get_triton_kernels_for_op

    from lutgemm.kernels import launch

    assert launch
    for op, kernels in (
        ("bcq", {"lut_gemm", "biqgemm", "bcq_dequant_gemm", "bcq_dequantize", "reduce"}),
        ("codebook", {"psumbook", "codegemm", "codebook_dequant_gemm", "codebook_dequantize", "reduce"}),
    ):
        found = {kernel.fn.__name__ for kernel in get_triton_kernels_for_op(f"lutgemm::_triton_{op}_linear")}
        assert found == {f"{name}_kernel" for name in kernels}
