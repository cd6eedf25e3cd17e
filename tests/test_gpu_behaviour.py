"""GPU backends on a real device: repeats, changes, gradients; and of Triton what test_cuda_gpu.py checks of CUDA.

Skipped, with the reason, where there is no GPU.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import REQUIRED

import lutgemm
from lutgemm.backends import registry
from lutgemm.testing.cases import OpCase

pytestmark = pytest.mark.gpu

CASES = (
    OpCase(M=1, N=512, K=1024, bits=2, group_size=128, dtype="float16", bias=True, accuracy="accurate"),
    OpCase(M=4, N=300, K=1100, bits=3, group_size=64, dtype="bfloat16", accuracy="accurate"),
    OpCase(M=33, N=260, K=512, bits=4, group_size=128, dtype="float16", accuracy="accurate"),
    OpCase("codebook_linear", M=2, N=256, K=512, codebook_bits=8, group_size=128, dtype="float16", accuracy="accurate"),
)


def runs(*backends: str) -> list[Any]:
    """Every algorithm of these backends on every case; one skip, or failure, for a backend that is absent."""
    found: list[Any] = []
    for backend in backends:
        reason = registry()[backend].unavailable() or ("" if torch.cuda.is_available() else "torch sees no CUDA device")
        if reason:
            marks = [] if backend in REQUIRED else [pytest.mark.skip(reason=f"backend {backend}: {reason}")]
            found.append(pytest.param(reason, id=f"{backend}-unavailable", marks=marks))
            continue
        for case in CASES:
            for algorithm in registry()[backend].algorithms[case.op]:
                if registry()[backend].unsupported(case.problem("cuda"), algorithm):
                    continue
                found.append(pytest.param((backend, algorithm, case), id=f"{backend}-{algorithm}-{case.name}"))
    return found


class Call:
    """One algorithm of one backend on a case's tensors on a device."""

    def __init__(self, backend: str, algorithm: str, case: OpCase, device: str = "cuda") -> None:
        inputs = case.inputs()
        self.x, self.weight = inputs.x.to(device), inputs.weight.to(device)
        self.bias = None if inputs.bias is None else inputs.bias.to(device)
        self.choice = {"backend": backend, "algorithm": algorithm, "accuracy": case.accuracy}

    def __call__(self) -> torch.Tensor:
        return lutgemm.ops.linear(self.x, self.weight, self.bias, **self.choice)


@pytest.fixture
def call(request: pytest.FixtureRequest) -> Iterator[Call]:
    if isinstance(request.param, str):
        pytest.fail(f"--require: {request.param}")
    backend, algorithm, case = request.param
    yield Call(backend, algorithm, case)
    torch.cuda.synchronize()


@pytest.mark.parametrize("call", runs("triton"), indirect=True)
def test_a_graph_replays_on_new_activations(call):
    eager = call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    graph.replay()
    assert torch.equal(y, eager)
    call.x.copy_(call.x.flip(0) * 0.5 + 1)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, call())


@pytest.mark.parametrize("call", runs("triton"), indirect=True)
def test_streams_do_not_disturb_each_other(call):
    expected = call()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(call())
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


@pytest.mark.parametrize("call", runs("cuda", "triton"), indirect=True)
def test_twenty_runs_have_the_same_bits(call):
    expected = call()
    assert all(torch.equal(call(), expected) for _ in range(20))


@pytest.mark.parametrize("call", runs("triton"), indirect=True)
def test_compiled_calls_are_eager_ones(call):
    expected = call()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(), expected)


@pytest.mark.parametrize("call", runs("triton"), indirect=True)
def test_the_device_of_x_is_where_it_runs(call):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    expected = call()
    call.x, call.weight = call.x.to("cuda:1"), call.weight.to("cuda:1")
    call.bias = None if call.bias is None else call.bias.to("cuda:1")
    with torch.cuda.device(0):
        y = call()
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.to("cuda:0"), expected)


@pytest.mark.parametrize("call", runs("cuda", "triton"), indirect=True)
def test_a_changed_weight_is_seen(call):
    call()
    call.weight.tensors["scales"].mul_(2)
    changed = call()
    call.weight = type(call.weight)(call.weight.layout, {n: t.clone() for n, t in call.weight.tensors.items()})
    assert torch.equal(changed, call())


@pytest.mark.parametrize("call", runs("cuda", "triton"), indirect=True)
def test_gradients_are_those_of_the_cpu(call):
    x = call.x.float().requires_grad_()
    lutgemm.ops.linear(x, call.weight, backend="auto").square().sum().backward()
    on_cpu = call.x.float().cpu().requires_grad_()
    lutgemm.ops.linear(on_cpu, call.weight.to("cpu"), accuracy="exact").square().sum().backward()
    error = (x.grad.cpu() - on_cpu.grad).norm() / on_cpu.grad.norm()
    assert error < 5e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_layers_move_to_the_device():
    layer = lutgemm.BCQLinear.from_weight(CASES[0].weight())
    x = CASES[0].inputs().x
    expected = layer(x.float()).to(torch.float32)
    moved = layer.to("cuda")
    y = moved(x.to("cuda")).float().cpu()
    assert (y - expected).norm() / expected.norm() < 2e-3
