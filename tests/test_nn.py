"""The quantized layers as modules."""

import copy
import io
import threading

import pytest
import torch
from linear_models import CODEBOOK, CONFIGS, FREE, Conv1D, quantized, random_linear
from torch import nn
from torch.nn import functional

import lutgemm
from lutgemm.errors import ArgumentError, FormatError
from lutgemm.formats import BCQLayout, CodebookLayout
from lutgemm.nn import BCQLinear, CodebookLinear, QuantizedLinear, replace_linear


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dequantized_linear(config, bias):
    linear = random_linear(bias=bias)
    layer = QuantizedLinear.from_linear(linear, config)
    layer.accuracy = "exact"
    assert type(layer) is (CodebookLinear if config is CODEBOOK else BCQLinear)
    x = torch.randn(2, 5, 70)
    torch.testing.assert_close(layer(x), functional.linear(x, layer.weight_record.dequantize(), linear.bias))
    assert layer.bias is linear.bias
    assert layer(x[:, :0]).shape == (2, 0, 24)


@pytest.mark.parametrize("config", CONFIGS)
def test_tensors_are_registered_under_their_record_names(config):
    layer = quantized(config)
    assert set(layer.state_dict()) == {*layer.layout.specs(), "bias"}
    assert {n for n, _ in layer.named_parameters()} == {
        n for n, t in layer.state_dict().items() if t.is_floating_point()
    }
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    for name, tensor in layer.weight_record.tensors.items():
        assert tensor is getattr(layer, name)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("cast", ["to", "half", "double", "type"])
def test_casts_change_the_bias_only(config, cast):
    layer = quantized(config)
    before = {name: tensor.clone() for name, tensor in layer.weight_record.tensors.items()}
    dtype = {"to": torch.bfloat16, "half": torch.float16, "double": torch.float64, "type": torch.bfloat16}[cast]
    layer = getattr(layer, cast)(*([dtype] if cast in ("to", "type") else []))
    assert layer.bias.dtype == layer.dtype == layer.weight.dtype == dtype
    for name, tensor in layer.weight_record.tensors.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    if cast != "double":
        assert layer(torch.randn(3, 70, dtype=dtype)).dtype == dtype


def test_cast_of_a_layer_without_bias_is_remembered():
    layer = quantized(bias=False).to(torch.bfloat16)
    assert layer.dtype == layer.weight.dtype == torch.bfloat16


def test_cast_casts_the_gradient_of_the_bias_and_keeps_that_of_scales():
    layer = quantized()
    layer.scales.requires_grad_(True)
    layer(torch.randn(3, 70)).sum().backward()
    layer.to(torch.bfloat16)
    assert layer.bias.grad.dtype == torch.bfloat16
    assert layer.scales.grad.dtype == layer.scales.dtype == torch.float16


@pytest.mark.parametrize("config", CONFIGS)
def test_copies_are_equal_and_independent(config):
    layer = quantized(config)
    x = torch.randn(3, 70)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        twin.scales.mul_(2)
    assert torch.equal(layer(x), y)
    assert not torch.equal(twin(x), y)
    assert twin.weight_record.scales is twin.scales


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(config, assign):
    layer, x = quantized(config), torch.randn(3, 70)
    other = QuantizedLinear.empty(layer.layout, bias=True, device="meta" if assign else "cpu")
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    assert torch.equal(other(x), layer(x))
    assert other.weight_record.codes is other.codes


def test_loading_replaces_what_was_computed_before():
    first, second = quantized(), quantized()
    with torch.no_grad():
        second.scales.mul_(3)
    x = torch.randn(2, 70)
    first(x)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))


def _break(state: dict, case: str) -> dict:
    if case == "shape":
        state["block.scales"] = state["block.scales"][:, :-1]
    elif case == "dtype":
        state["block.scales"] = state["block.scales"].float()
    elif case == "header":
        state["block.header"] = state["block.header"].clone().index_fill_(0, torch.tensor(0), 2)
    elif case == "nan":
        state["block.scales"] = torch.full_like(state["block.scales"], float("nan"))
    elif case == "codes":
        state["block.codes"] = torch.full_like(state["block.codes"], 64)
    return state


@pytest.mark.parametrize("case", ["shape", "dtype", "header", "nan", "codes"])
def test_loading_refuses_a_wrong_tensor_and_names_the_module(case):
    model = nn.Sequential()
    model.add_module("block", quantized(CODEBOOK))
    x = torch.randn(2, 70)
    y = model(x)
    with pytest.raises(FormatError, match="block: codebook weight"):
        model.load_state_dict(_break(dict(model.state_dict()), case))
    assert torch.equal(model(x), y)


def test_loading_without_a_tensor_is_an_error():
    layer = quantized()
    state = layer.state_dict()
    del state["codes"]
    with pytest.raises(RuntimeError, match="codes"):
        layer.load_state_dict(state)


def test_empty_layers_on_meta_have_their_layout():
    for layout in (BCQLayout(8, 40, 2, 32), CodebookLayout(8, 40, 1, 4, 8, 40)):
        layer = QuantizedLinear.empty(layout, bias=True, dtype=torch.bfloat16, device="meta")
        assert layer.codes.is_meta
        assert layer.bias.dtype == torch.bfloat16
        assert layer(torch.empty(3, 40, dtype=torch.bfloat16, device="meta")).shape == (3, 8)


def test_repr_states_the_bits():
    assert "70, 24, bias=True, " in repr(quantized())
    assert f"{quantized().layout.bits_per_weight:.2f} bits per weight" in repr(quantized())


def test_x_of_another_dtype_than_the_bias_is_refused_as_in_torch():
    layer = quantized()
    with pytest.raises(ArgumentError, match="bias"):
        layer(torch.randn(2, 70).half())
    assert quantized(bias=False)(torch.randn(2, 70).half()).dtype == torch.float16


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_its_dtype_as_in_torch(config, dtype):
    linear = random_linear()
    layer, x = QuantizedLinear.from_linear(linear, config), torch.randn(4, 70)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        assert y.dtype == linear(x).dtype == dtype
    assert torch.equal(y, copy.deepcopy(layer).to(dtype)(x.to(dtype)))


def test_threads_share_a_layer():
    layer, x = quantized(CODEBOOK), torch.randn(8, 70)
    expected, results = copy.deepcopy(layer)(x), []

    def work() -> None:
        results.extend(torch.equal(layer(x), expected) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(results)


def test_wrong_config_or_module_is_refused():
    with pytest.raises(ArgumentError, match="CodebookLinear takes a codebook"):
        CodebookLinear.from_linear(random_linear(), FREE)
    with pytest.raises(ArgumentError, match="Conv2d"):
        BCQLinear.from_linear(nn.Conv2d(2, 2, 1), FREE)
    with pytest.raises(ArgumentError, match="BCQWeight"):
        CodebookLinear(quantized().weight_record)
    with pytest.raises(ArgumentError, match=r"expected \[24\]"):
        BCQLinear(quantized().weight_record, torch.zeros(23))


def test_conv1d_is_taken_transposed():
    conv = Conv1D(24, 70)
    model = nn.ModuleDict({"c_attn": conv})
    report = replace_linear(model, lutgemm.BCQConfig(bits=8, group_size=32))
    x = torch.randn(3, 70)
    assert [(e.name, e.out_features, e.in_features) for e in report.layers] == [("c_attn", 24, 70)]
    assert (model["c_attn"](x) - conv(x)).norm() / conv(x).norm() < 0.02


@pytest.mark.parametrize("config", CONFIGS)
def test_part_of_a_layer_can_be_loaded_into_an_empty_one(config):
    """What is given is checked, the memory that waits for the rest is not."""
    full = quantized(config)
    state = full.state_dict()
    empty = QuantizedLinear.empty(full.layout, bias=True)
    for name, tensor in empty.state_dict().items():
        if name != "header":
            tensor.fill_(float("nan") if tensor.is_floating_point() else 255 if tensor.dtype == torch.uint8 else -1)
    first = {name: state[name] for name in ("header", "codes")}
    with pytest.raises(FormatError, match="NaN or Inf"):
        empty.load_state_dict({"scales": state["scales"] * float("nan")}, strict=False)
    bad = state["codes"].clone().fill_(-1 if config is not CODEBOOK else 64)
    with pytest.raises(FormatError, match="codes"):
        empty.load_state_dict({"codes": bad}, strict=False)
    missing = empty.load_state_dict(first, strict=False).missing_keys
    assert set(missing) == state.keys() - first.keys()
    empty.load_state_dict({name: state[name] for name in missing}, strict=False)
    x = torch.randn(2, 70)
    assert torch.equal(empty(x), full(x))
