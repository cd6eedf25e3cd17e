"""Siblings over stacked rows: the CUDA kernels under the emulator, on CPU tensors. Needs g++."""

import copy
import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import emulated_backend
import pytest
import torch
from conftest import REQUIRED
from emulated_backend import NAME, Emulated
from sibling_models import BCQ, UNIFORM, Attention
from torch import nn

import lutgemm
from lutgemm import fusion
from lutgemm.backends import cuda, cuda_siblings, gpu_layouts, prepared
from lutgemm.fusion import fuse
from lutgemm.nn import replace_linear, set_accuracy
from lutgemm.testing.cases import OpCase

backends = importlib.import_module("lutgemm.backends")


@pytest.fixture(scope="module")
def emulated() -> Iterator[Emulated]:
    """The emulated backend, which "auto" takes."""
    if emulated_backend.compiler() is None:
        if "emulator" in REQUIRED:
            pytest.fail("--require emulator: no g++ is on PATH")
        pytest.skip("no g++ is on PATH")
    built = emulated_backend.emulated()
    chosen = {NAME: built.backend, **backends._registry()}
    patch = pytest.MonkeyPatch()
    patch.setattr(backends, "_registry", lambda: chosen)
    patch.setitem(cuda_siblings.NAMESPACES, built.backend.bcq_linear, emulated_backend.NAMESPACE)
    backends.registry.cache_clear()
    backends.forget_choices()
    yield built
    patch.undo()
    backends.registry.cache_clear()
    backends.forget_choices()


@pytest.fixture(autouse=True)
def one_multiprocessor(emulated: Emulated) -> Iterator[None]:
    """On which layers of this size are not split along K, so that stacked rows give the same bits."""
    emulated.control.set(sm_count=1)
    yield
    emulated.control.set(sm_count=4)


@pytest.fixture
def rows(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call of a kernel for siblings."""
    calls: list[int] = []
    operator = cuda_siblings._operator

    def counting(namespace: str, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            y = operator(namespace, name)(*arguments)
            if name != "_gpu_place":
                calls.append(y.shape[1])
            return y

        return call

    monkeypatch.setattr(cuda_siblings, "_operator", counting)
    return calls


RATIO = "ratio"


def pair(config: Any = BCQ, bias: bool = False) -> tuple[nn.Module, nn.Module]:
    """The same layers, apart and fused. RATIO: with the same ratios."""
    model = Attention(bias)
    if config is RATIO:
        for name, linear in list(model.named_children()):
            weight = OpCase(N=linear.out_features, K=96, group_size=32, bits=2, scale_kind="ratio").weight()
            weight.tensors["ratios"].copy_(torch.tensor([1.0, 0.375]))
            setattr(model, name, lutgemm.BCQLinear.from_weight(weight, linear.bias))
    else:
        replace_linear(model, config)
    twin = copy.deepcopy(model)
    assert fuse(model) == 1
    return twin.requires_grad_(False), model.requires_grad_(False)


ALL = 70 + 20 + 33


def close(y: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((y - expected).float().norm() <= 2e-6 * expected.float().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", [BCQ, UNIFORM, RATIO])
def test_stacked_rows_give_what_layers_give(config, bias, rows):
    apart, fused = pair(config, bias)
    with torch.no_grad():
        for accuracy in ("auto", "exact"):  # bit_planes, lut_gemm or biqgemm
            set_accuracy(apart, accuracy), set_accuracy(fused, accuracy)
            for shape in ((1, 96), (1, 1, 96), (5, 96), (2, 3, 96), (96,), (0, 96), (20, 96)):
                x = torch.randn(shape)
                assert torch.equal(fused(x), apart(x))
    exact_large = 1  # above 16 tokens "exact" is dequantized, each layer on its own
    assert rows == [ALL] * (2 * 7 - exact_large)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, rows):
    apart, fused = (model.to(dtype) for model in pair(BCQ, True))
    with torch.no_grad():
        for m in (1, 5):
            x = torch.randn(m, 96, dtype=dtype)
            assert torch.equal(fused(x), apart(x))
    assert rows == [ALL] * 2


def test_another_split_changes_no_more_than_the_last_bits(emulated, rows):
    weights = [OpCase(N=n, K=4096, group_size=128, bits=2, seed=n).weight() for n in (40, 8)]
    model = nn.Module()
    model.gate_proj, model.up_proj = (lutgemm.BCQLinear.from_weight(weight) for weight in weights)
    twin = copy.deepcopy(model)
    assert fuse(model) == 1
    emulated.control.set(sm_count=16)
    with torch.no_grad():
        for accuracy in ("auto", "exact"):
            set_accuracy(model, accuracy), set_accuracy(twin, accuracy)
            x = torch.randn(1, 4096)
            assert close(model.gate_proj(x), twin.gate_proj(x))
            assert close(model.up_proj(x), twin.up_proj(x))
    assert rows == [48] * 2


@pytest.mark.parametrize("m", [1, 5])
def test_parts_are_contiguous_and_count_their_own_changes(m, rows):
    apart, fused = pair()
    x, factor = torch.randn(m, 96), torch.ones(20, requires_grad=True)
    q, k, v = fused.q_proj(x), fused.k_proj(x), fused.v_proj(x)
    z = (k * factor).sum()
    q.mul_(2)
    z.backward()
    assert torch.equal(factor.grad, k.sum(0))
    assert torch.equal(q, 2 * apart.q_proj(x))
    assert torch.equal(v, apart.v_proj(x))
    for y in (q, k, v):
        assert y.is_contiguous()
        assert not y._is_view()
    assert rows == [ALL]


def double_scales(model: nn.Module) -> None:
    model.k_proj.scales.mul_(2)


def clear_codes(model: nn.Module) -> None:
    model.k_proj.codes.zero_()


def change_bias(model: nn.Module) -> None:
    model.k_proj.bias.add_(1)


def replace_scales(model: nn.Module) -> None:
    model.k_proj.scales = nn.Parameter(model.k_proj.scales * 3, requires_grad=False)


def ask_for_exact(model: nn.Module) -> None:
    set_accuracy(model, "exact")


@pytest.mark.parametrize("change", [double_scales, clear_codes, change_bias, replace_scales, ask_for_exact])
def test_a_change_of_one_is_seen(change, rows):
    apart, fused = pair(BCQ, True)
    x = torch.randn(1, 96)
    with torch.no_grad():
        assert torch.equal(fused.q_proj(x), apart.q_proj(x))
        before = apart.k_proj(x)
        change(apart), change(fused)
        assert torch.equal(fused.k_proj(x), apart.k_proj(x))
        assert not torch.equal(fused.k_proj(x), before)
        assert torch.equal(fused.v_proj(x), apart.v_proj(x))
        assert torch.equal(fused(x), apart(x))
        x.mul_(2)
        assert torch.equal(fused(x), apart(x))
    assert set(rows) == {ALL}


def without_a_bias(model: nn.Module) -> None:
    model.k_proj.bias = None


def without_offsets(model: nn.Module) -> None:
    model.k_proj = lutgemm.BCQLinear.from_weight(
        OpCase(N=20, K=96, group_size=32, bits=3, offsets=False).weight(), torch.zeros(20)
    )


def of_other_bits(model: nn.Module) -> None:
    model.k_proj = lutgemm.BCQLinear.from_weight(OpCase(N=20, K=96, group_size=32, bits=2).weight(), torch.zeros(20))


def of_other_scales(model: nn.Module) -> None:
    case = OpCase(N=20, K=96, group_size=32, bits=3, scale_dtype="float32")
    model.k_proj = lutgemm.BCQLinear.from_weight(case.weight(), torch.zeros(20))


@pytest.mark.parametrize("change", [without_a_bias, without_offsets, of_other_bits, of_other_scales])
def test_what_cannot_be_stacked_runs_apart(change, rows):
    apart, fused = pair(BCQ, True)
    change(fused)
    apart.k_proj = copy.deepcopy(fused.k_proj)
    if change is not without_a_bias:
        fuse(fused)
    x = torch.randn(1, 96)
    with torch.no_grad():
        assert torch.equal(fused(x), apart(x))
        assert torch.equal(fused(x), apart(x))
    assert not rows


def test_a_bias_that_comes_or_goes_between_calls_is_seen(rows):
    for bias in (False, True):
        apart, fused = pair(BCQ, bias)
        x = torch.randn(1, 96)
        with torch.no_grad():
            fused(x)
            for model in (apart, fused):
                for layer in model.children():
                    layer.bias = None if bias else nn.Parameter(torch.ones(layer.out_features), requires_grad=False)
            assert torch.equal(fused(x), apart(x))
    assert rows == [ALL] * 4


def test_other_ratios_and_gradients_run_apart(rows):
    apart, fused = pair(RATIO)
    for model in (apart, fused):
        model.k_proj.ratios.mul_(2)
    x = torch.randn(1, 96)
    with torch.no_grad():
        assert torch.equal(fused(x), apart(x))
    apart, fused = pair()
    x.requires_grad_(True)
    assert fused(x).requires_grad
    assert not rows


def test_what_is_never_fused_is_asked_once(rows, monkeypatch):
    asked = []
    choose = fusion.bcq_choice
    monkeypatch.setattr(fusion, "bcq_choice", lambda *arguments: asked.append(1) or choose(*arguments))
    dequantized, other_ratios = pair()[1], pair(RATIO)[1]
    set_accuracy(dequantized, "exact")
    other_ratios.k_proj.ratios.mul_(2)
    for fused, m in ((dequantized, 20), (other_ratios, 1)):
        asked.clear()
        with torch.no_grad():
            for _ in range(3):
                fused(torch.randn(m, 96))
        assert len(asked) == 3
    assert not rows


def test_a_layout_goes_with_any_sibling_and_no_weight_is_held_twice(rows):
    _, fused = pair()
    x = torch.randn(1, 96)
    with torch.no_grad():
        fused(x)
        kept = prepared.kept(fused.v_proj.codes)
        assert sorted(kind.split(" ")[1] for kind in kept) == ["planes", "siblings"]
        layouts = [weakref.ref(tensor) for tensor in kept["cuda planes"]]
        assert kept.keys() == prepared.kept(fused.q_proj.codes).keys()
        del kept, fused.v_proj
        gc.collect()
        assert [layout() for layout in layouts] == [None] * 2
        assert fused.q_proj(x).shape == (1, 70)
    assert rows == [ALL]


def test_parts_stay_in_their_stream_and_capture(rows, monkeypatch):
    apart, fused = pair()
    place = [7]
    monkeypatch.setattr(cuda_siblings, "place_of", lambda x, kernel: place[0])
    with torch.no_grad():
        x = torch.randn(1, 96)
        for elsewhere in (-1, -2, 8):  # two captures, another stream
            place[0] = 7
            assert torch.equal(fused.q_proj(x), apart.q_proj(x))
            part = fused.k_proj._fused[0]._local.pending.ys[1]
            place[0] = elsewhere
            y = fused.k_proj(x)
            assert part is not None
            assert y.data_ptr() != part.data_ptr()
            assert torch.equal(y, apart.k_proj(x))
            assert torch.equal(fused.v_proj(x), apart.v_proj(x))
    assert rows == [ALL] * 3


def test_a_capture_makes_no_layout_and_uses_one_that_is_there(rows, monkeypatch):
    apart, fused = pair()
    place = [-5]
    monkeypatch.setattr(cuda_siblings, "place_of", lambda x, kernel: place[0])
    x = torch.randn(1, 96)
    with torch.no_grad():
        assert torch.equal(fused(x), apart(x))
        assert not rows
        place[0] = 7
        fused(x)
        place[0] = -5
        monkeypatch.setattr(cuda_siblings, "_kept_call", None)
        for m in (1, 5):
            x = torch.randn(m, 96)
            assert torch.equal(fused(x), apart(x))
    assert rows == [ALL] * 3


def test_every_algorithm_but_dequantize_is_one_call(emulated):
    kernel = emulated.backend.bcq_linear
    records = [OpCase(N=n, K=96, group_size=32, bits=2).weight() for n in (20, 33)]
    siblings = [
        cuda_siblings.Sibling(
            gpu_layouts.BcqRecord(w.codes, w.scales, w.offsets, w.zeros, w.ratios, 96, 32, "free"), None
        )
        for w in records
    ]
    x = torch.randn(2, 96)
    for op, algorithm in gpu_layouts.algorithms():
        if op != "bcq_linear":
            continue
        plan = cuda_siblings.plan(siblings, x, kernel, algorithm, 1)
        assert (plan is None) == (algorithm == "dequantize")
        if plan is not None:
            tensors = records[0].tensors
            ys = plan[0].tail[0].run(x, plan[0].layout(tensors, tensors))
            for y, w in zip(ys, records, strict=True):
                assert torch.equal(y, lutgemm.bcq_linear(x, w, backend=NAME, algorithm=algorithm, accuracy="accurate"))
    assert cuda_siblings.NAMESPACES[cuda.BACKEND.bcq_linear] == "lutgemm"


REASON = cuda.BACKEND.unavailable()


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None and "cuda" not in REQUIRED, reason=f"backend cuda: {REASON}")
@pytest.mark.parametrize("m", [1, 5])
def test_graphs_on_a_gpu(m, rows):
    assert REASON is None, f"--require cuda: {REASON}"
    apart, fused = (model.to("cuda") for model in pair(BCQ, True))
    x, other = torch.randn(2, m, 96, device="cuda")
    with torch.no_grad():
        fuse(fused, ())
        fused.k_proj(x)  # has a layout of its own then
        fuse(fused)
        assert close(fused(x), apart(x))
        whole, part = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        fused.q_proj(x)
        with torch.cuda.graph(part):
            k = fused.k_proj(x)
        fused.v_proj(x)
        with torch.cuda.graph(whole):
            y = fused(x)
        x.copy_(other)
        part.replay(), whole.replay()
        assert close(y, apart(x))
        assert close(k, apart.k_proj(x))
    assert rows == [ALL] * 3
