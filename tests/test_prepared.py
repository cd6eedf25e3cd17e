"""Layouts that kernels keep beside a weight: made once, made again after a change, gone with the tensors."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch

import lutgemm
from lutgemm.backends import cpu, prepared
from lutgemm.formats import QuantizedWeight
from lutgemm.nn import QuantizedLinear
from lutgemm.ops import linear
from lutgemm.testing.cases import CASES, OpCase

pytestmark = pytest.mark.skipif(
    cpu.BACKEND.unavailable() is not None, reason=f"backend cpu: {cpu.BACKEND.unavailable()}"
)

X = torch.randn(2, 72, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CASES)
def weight(request: pytest.FixtureRequest) -> QuantizedWeight:
    return OpCase(op=request.param, scale_dtype="float32").weight()


@pytest.fixture
def preparations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one for each weight that is prepared for a kernel."""
    made, keep = [], prepared.keep
    monkeypatch.setattr(prepared, "keep", lambda *arguments: made.append(1) or keep(*arguments))
    return made


def fresh(weight: QuantizedWeight, x: torch.Tensor = X) -> torch.Tensor:
    """The result of a weight of the same values whose tensors no kernel has seen."""
    with torch.inference_mode(False):
        return linear(x, type(weight)(weight.layout, {name: t.detach().clone() for name, t in weight.tensors.items()}))


def test_a_weight_is_prepared_once(weight, preparations):
    assert prepared.kept(weight.codes) == {}
    y = linear(X, weight)
    assert torch.equal(linear(X, weight), y)
    linear(X[:1], weight)
    assert len(preparations) == 1
    assert len(prepared.kept(weight.codes)) == 1


def test_dequantize_prepares_nothing(weight, preparations):
    linear(X, weight, algorithm="dequantize", accuracy="exact")
    assert not preparations


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_changes_in_place_are_seen(weight, preparations, mode):
    linear(X, weight)
    with mode():
        for count, name in enumerate(weight.tensors, start=1):
            if name != "header":
                weight.tensors[name].copy_(weight.tensors[name].flip(1 if name != "offsets" else 0))
                assert torch.equal(linear(X, weight), fresh(weight))
                assert len(preparations) == 1 + 2 * (count - 1)


def test_a_replaced_tensor_is_seen(weight):
    """Also one that takes the place in memory of the one before it."""
    layer = QuantizedLinear.from_weight(weight)
    for factor in (2.0, 3.0, 4.0):
        layer.scales = torch.nn.Parameter(layer.scales.detach() * factor, requires_grad=False)
        assert torch.equal(layer(X), fresh(layer.weight_record))


def test_functional_calls_see_their_own_scales(weight):
    layer = QuantizedLinear.from_weight(weight)
    for factor in (1.0, 2.0, 3.0):
        scales = layer.scales * factor
        y = torch.func.functional_call(layer, {"scales": scales}, (X,))
        assert torch.equal(y, fresh(type(weight)(weight.layout, weight.tensors | {"scales": scales})))
        assert torch.equal(layer(X), fresh(weight))


def test_repack_tells_of_a_change_through_data(weight):
    before = linear(X, weight)
    weight.scales.data.mul_(2)
    assert torch.equal(linear(X, weight), before), "torch counts changes through .data: say so in the documentation"
    weight.repack()
    assert torch.equal(linear(X, weight), fresh(weight))
    assert not torch.equal(linear(X, weight), before)
    weight.scales.data = weight.scales.data / 2
    torch.testing.assert_close(linear(X, weight), before)


def test_training_prepares_once_per_step(weight, preparations):
    weight.scales.requires_grad_(True)
    optimizer = torch.optim.SGD([weight.scales], lr=1e-3)
    for step in range(3):
        for _ in range(4):
            linear(X, weight).square().sum().backward()
        assert len(preparations) == step + 1
        optimizer.step()
    preparations.clear()
    assert torch.equal(linear(X, weight), fresh(weight))


def test_layouts_go_with_the_tensors(weight):
    gc.collect()
    linear(X, weight)
    (layout,) = prepared.kept(weight.codes).values()
    gone, codes, entries = weakref.ref(layout), weight.codes, len(prepared._entries)
    del layout
    gc.collect()
    assert gone() is not None
    del weight.tensors["scales"]  # the first of the tensors to go
    gc.collect()
    assert gone() is None
    assert prepared.kept(codes) == {}
    assert len(prepared._entries) == entries - 1


def test_a_layout_is_kept_no_longer_than_its_layer():
    gc.collect()
    layer = QuantizedLinear.from_weight(OpCase().weight())
    layer(X)
    gone, entries = weakref.ref(next(iter(prepared.kept(layer.codes).values()))), len(prepared._entries)
    del layer
    gc.collect()
    assert gone() is None
    assert len(prepared._entries) == entries - 1


def test_kinds_lie_side_by_side(weight):
    tensors = (*(weight.tensors[name] for name in weight.tensors if name != "header"), None)
    state = prepared.state_of(tensors)
    for kind in ("words", "bytes"):
        prepared.keep(tensors, (32,), state, kind, torch.ones(1))
    assert set(prepared.kept(tensors[0])) == {"words", "bytes"}
    assert prepared.find(tensors, (32,), "words") is not prepared.find(tensors, (32,), "bytes")
    assert prepared.find(tensors, (64,), "words") is None
    for place in range(len(tensors) - 1):
        other = (*tensors[:place], tensors[place].clone(), *tensors[place + 1 :])
        assert prepared.find(other, (32,), "words") is None
    tensors[1].add_(0)
    assert prepared.find(tensors, (32,), "words") is None
    prepared.keep(tensors, (32,), prepared.state_of(tensors), "words", torch.ones(1))
    assert set(prepared.kept(tensors[0])) == {"words"}


def test_records_that_share_tensors_keep_their_own(weight, preparations):
    """Two layers of one record, the record itself, copies of the pair, and records that differ in one tensor only."""
    layers = torch.nn.ModuleList([QuantizedLinear.from_weight(weight) for _ in range(2)])
    copies = copy.deepcopy(layers)
    assert copies[0].codes is copies[1].codes
    varied = [
        type(weight)(weight.layout, weight.tensors | {name: tensor.clone()})
        for name, tensor in weight.tensors.items()
        if name != "header"
    ]
    calls = [*layers, *copies, *(lambda x, w=w: linear(x, w) for w in (weight, *varied))]
    expected = fresh(weight)
    preparations.clear()
    for _ in range(3):
        assert all(torch.equal(call(X), expected) for call in calls)
    assert len(preparations) == len(calls)
    entries = sum(map(len, prepared._entries.values()))
    layers[0].scales.data.mul_(2)  # the memory of all
    layers[0].weight_record.repack()
    assert prepared.kept(weight.codes) == {}
    assert not torch.equal(linear(X, weight), expected)
    del calls, varied, layers, copies
    gc.collect()
    assert sum(map(len, prepared._entries.values())) <= entries - len(expected[0].shape) - 4
    assert len(prepared.kept(weight.codes)) == 1


def test_a_view_that_is_held_is_prepared_once(preparations):
    lower = OpCase(bits=3).weight().at(2)
    for _ in range(3):
        linear(X, lower)
    assert len(preparations) == 1


@pytest.fixture
def swapping() -> Iterator[None]:
    """`torch.utils.swap_tensors` is how modules change their tensors; it refuses those with weak references."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("fused", [False, True])
def test_tensors_may_be_swapped_after_a_call(swapping, fused):
    model = torch.nn.ModuleDict({n: QuantizedLinear.from_weight(OpCase(bits=3).weight()) for n in ("w1", "w3")})
    for layer in model.values():
        layer.bias = torch.nn.Parameter(torch.randn(layer.out_features), requires_grad=False)
    assert lutgemm.fuse(model) == 1
    if not fused:
        lutgemm.fuse(model, ())
    model["w1"](X), model["w3"](X)
    model.to(torch.bfloat16)
    assert model["w1"].bias.dtype == torch.bfloat16
    model["w1"](X.bfloat16()), model["w3"](X.bfloat16())
    model.to(torch.float32)
    model["w1"](X), model["w3"](X)
    model.load_state_dict({name: t * 2 if name.endswith("scales") else t for name, t in model.state_dict().items()})
    for layer in model.values():
        assert torch.equal(layer(X), fresh(layer.weight_record) + layer.bias)
        assert prepared.kept(layer.codes)


def test_copies_and_files_hold_the_record_only(weight):
    layer = QuantizedLinear.from_weight(weight)
    y = layer(X)
    stored = sum(t.nbytes for t in layer.state_dict().values())
    for data in (pickle.dumps(layer.state_dict()), pickle.dumps(layer)):
        assert len(data) < stored + 8000
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert prepared.kept(twin.codes) == {}
        assert torch.equal(twin(X), y)
    assert torch.equal(linear(X, copy.deepcopy(weight)), y)


def test_bare_inference_tensors_are_prepared_in_every_call_and_said_so_once(weight, preparations):
    with torch.inference_mode():
        made = type(weight)(weight.layout, {name: t.clone() for name, t in weight.tensors.items()})
        prepared._warn_of_inference_tensors.cache_clear()
        with pytest.warns(RuntimeWarning, match=r"prepared again in every call.*make or load it outside"):
            first = linear(X, made)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(linear(X, made), first)
            made.scales.mul_(2)
            assert torch.equal(linear(X, made), fresh(made))
    assert prepared.kept(made.codes) == {}


def test_layers_hold_normal_tensors_whatever_mode_they_are_made_in(preparations):
    config = lutgemm.BCQConfig(bits=2, group_size=32, iters=1)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        made = QuantizedLinear.from_linear(torch.nn.Linear(72, 20), config)
        empty = QuantizedLinear.empty(made.layout, bias=True)
        loaded = QuantizedLinear.empty(made.layout, bias=True, device="meta")
        loaded.load_state_dict({name: t.clone() for name, t in made.state_dict().items()}, assign=True)
        copied, cast = copy.deepcopy(made), copy.deepcopy(made).to(torch.bfloat16).to(torch.float32)
        for layer in (made, loaded, copied, cast):
            layer(X)
            layer(X)
            layer.scales.mul_(2)
            assert torch.equal(layer(X), linear(X, layer.weight_record, layer.bias))
    for layer in (made, empty, loaded, copied, cast):
        assert not any(t.is_inference() for t in (*layer.parameters(), *layer.buffers()))
    assert len(preparations) == 8
    made.accuracy = "exact"
    torch.testing.assert_close(made(X), torch.nn.functional.linear(X, made.weight, made.bias), rtol=1e-5, atol=1e-4)


def test_threads_that_call_a_fresh_layer_at_once():
    weights = [OpCase(op=op, N=65, seed=seed).weight() for op in CASES for seed in range(8)]
    expected = [fresh(weight) for weight in weights]
    start, wrong = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        for weight, y in zip(weights, expected, strict=True):
            if not all(torch.equal(linear(X, weight), y) for _ in range(3)):
                wrong.append(weight)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
