"""What only a GPU can show: streams, graphs, several devices, torch.compile, the allocator; a subset for the sanitizer.

The cases themselves run on a GPU in test_kernels.py, and without one in test_cuda_emulated.py. Skipped without the cuda
backend, or failed under `--require cuda`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import REQUIRED

import lutgemm
from lutgemm.backends import cuda, gpu_layouts, prepared
from lutgemm.errors import BackendError
from lutgemm.formats import QuantizedWeight
from lutgemm.ops import linear
from lutgemm.testing.cases import CASES, OpCase
from lutgemm.testing.numerics import RELATIVE_ERROR, assert_equal, exact_result, relative_error

pytestmark = pytest.mark.gpu

ALGORITHMS = list(gpu_layouts.algorithms())
LAYER = {"N": 1100, "K": 2048, "bits": 3, "codebook_bits": 8, "group_size": 128, "bias": True, "dtype": "float16"}


if (REASON := cuda.BACKEND.unavailable()) and "cuda" not in REQUIRED:
    pytest.skip(f"backend cuda: {REASON}", allow_module_level=True)


@pytest.fixture(autouse=True)
def needs_the_backend() -> None:
    assert REASON is None, f"--require cuda: {REASON}"


def on_gpu(case: OpCase, device: str = "cuda") -> tuple[torch.Tensor, QuantizedWeight, torch.Tensor | None]:
    """x, weight and bias of the random tier, on a GPU."""
    inputs = case.inputs()
    return inputs.x.to(device), inputs.weight.to(device), None if inputs.bias is None else inputs.bias.to(device)


def as_taken(algorithm: str, case: OpCase) -> OpCase:
    """The case, less accurate or in fp16 for an algorithm that refuses "exact" or fp32."""
    less = replace(case, accuracy="accurate")
    for changed in (case, less, replace(less, dtype="float16")):
        reason = cuda.BACKEND.unsupported(changed.problem("cuda"), algorithm)
        if reason is None:
            return changed
    pytest.skip(str(reason))


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_a_graph_replays_a_call(op: str, algorithm: str, m: int) -> None:
    case = as_taken(algorithm, OpCase(op=op, M=m, **LAYER))
    x, weight, bias = on_gpu(case)
    choice = {"backend": "cuda", "algorithm": algorithm, "accuracy": case.accuracy}
    expected = linear(x, weight, bias, **choice)
    graph, other = torch.cuda.CUDAGraph(), torch.randn_like(x)
    with torch.cuda.graph(graph):
        y = linear(x, weight, bias, **choice)
    graph.replay()
    assert_equal(y, expected)
    x.copy_(other)
    graph.replay()
    assert_equal(y, linear(other, weight, bias, **choice))


@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_a_capture_without_a_layout_is_refused(op: str, algorithm: str) -> None:
    case = as_taken(algorithm, OpCase(op=op, M=1, **LAYER))
    x, weight, bias = on_gpu(case)
    linear(x, weight, bias, backend="cuda", algorithm=algorithm, accuracy=case.accuracy)
    if not prepared.kept(weight.codes):
        pytest.skip(f"{algorithm} reads the stored tensors")
    weight, refused = weight.to("cpu").to("cuda"), ""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add(1)  # an empty capture is a warning
        try:
            linear(x, weight, bias, backend="cuda", algorithm=algorithm, accuracy=case.accuracy)
        except BackendError as error:
            refused = str(error)
    assert "call the layer once" in refused


@pytest.mark.parametrize("op", CASES)
def test_streams_do_not_wait_for_each_other_and_agree(op: str) -> None:
    x, weight, bias = on_gpu(OpCase(op=op, M=2, **LAYER))
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(linear(x, weight, bias, backend="cuda"))
    torch.cuda.synchronize()
    for y in results:
        assert_equal(y, results[0])


@pytest.mark.parametrize("op", CASES)
def test_a_layout_made_on_one_stream_is_complete_on_another(op: str) -> None:
    for seed in range(5):
        x, weight, bias = on_gpu(OpCase(op=op, M=1, seed=seed, **LAYER))
        torch.cuda.synchronize()
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(first):
            one = linear(x, weight, bias, backend="cuda")
        with torch.cuda.stream(second):
            two = linear(x, weight, bias, backend="cuda")
        torch.cuda.synchronize()
        assert_equal(two, one)


@pytest.mark.parametrize("op", CASES)
def test_the_device_of_x_is_used_whichever_is_current(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    case = OpCase(op=op, M=3, **LAYER)
    expected = linear(*on_gpu(case, "cuda:0"), backend="cuda").cpu()
    x, weight, bias = on_gpu(case, "cuda:1")
    for current in (0, 1):
        with torch.cuda.device(current):
            y = linear(x, weight, bias, backend="cuda")
            assert torch.cuda.current_device() == current
        assert y.device == torch.device("cuda", 1)
        assert_equal(y.cpu(), expected)


@pytest.mark.parametrize("op", CASES)
def test_auto_takes_this_backend(op: str) -> None:
    x, weight, bias = on_gpu(OpCase(op=op, M=4, **LAYER))
    assert lutgemm.backends()["cuda"] is None
    assert_equal(linear(x, weight, bias), linear(x, weight, bias, backend="cuda"))


@pytest.mark.parametrize("op", CASES)
def test_a_compiled_call_with_graphs_is_the_eager_one(op: str) -> None:
    """`reduce-overhead` captures into a pool of its own: kept layouts must not lie in it."""
    x, weight, bias = on_gpu(OpCase(op=op, M=4, **LAYER))

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return linear(x * 2, weight, bias, backend="cuda")

    expected = linear(x * 2, weight, bias, backend="cuda")
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        assert_equal(compiled(x).clone(), expected)
    other = torch.randn(4, 4096, dtype=torch.float16, device="cuda")
    assert torch.isfinite(other @ other.T).all()
    assert_equal(compiled(x).clone(), expected)


@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_calls_leave_no_memory_behind(op: str, algorithm: str) -> None:
    case = as_taken(algorithm, OpCase(op=op, M=7, **LAYER))
    x, weight, bias = on_gpu(case)
    linear(x, weight, bias, backend="cuda", algorithm=algorithm, accuracy=case.accuracy)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        linear(x, weight, bias, backend="cuda", algorithm=algorithm, accuracy=case.accuracy)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.sanitizer
@pytest.mark.parametrize(("m", "scale_kind"), [(1, "free"), (3, "free"), (17, "free"), (2, "uniform")])
@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_small_calls_for_the_sanitizer(op: str, algorithm: str, m: int, scale_kind: str) -> None:
    """Remainders in every dimension; under compute-sanitizer each launch takes a hundred times as long."""
    if op == "codebook_linear" and scale_kind != "free":
        pytest.skip("a kind of BCQ")
    shape = {"M": m, "N": 70, "K": 300, "group_size": 64, "bias": True}
    case = as_taken(algorithm, OpCase(op=op, bits=3, codebook_bits=8, scale_kind=scale_kind, **shape))
    inputs = case.inputs("exact")
    bias = None if inputs.bias is None else inputs.bias.cuda()
    choice = {"backend": "cuda", "algorithm": algorithm, "accuracy": case.accuracy}
    y = linear(inputs.x.cuda(), inputs.weight.to("cuda"), bias, **choice)
    truth = exact_result(inputs.x, inputs.weight, inputs.bias)
    if case.accuracy == "exact":
        assert_equal(y.cpu(), truth.to(y.dtype))
    else:
        assert relative_error(y.cpu(), truth) <= RELATIVE_ERROR[case.accuracy]
