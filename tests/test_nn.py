"""The quantized layers as modules, and their swap into a model."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

import lutgemm
from lutgemm.errors import ArgumentError, FormatError
from lutgemm.formats import BCQLayout, CodebookLayout
from lutgemm.nn import BCQLinear, CodebookLinear, QuantizedLinear, Selection, replace_linear

FREE = lutgemm.BCQConfig(bits=3, group_size=32, scale_kind="free", iters=2)
UNIFORM = lutgemm.BCQConfig(bits=4, group_size=32, scale_kind="uniform")
CODEBOOK = lutgemm.CodebookConfig(codebook_bits=6, group_size=32, iters=2)
CONFIGS = [FREE, UNIFORM, CODEBOOK]


def random_linear(n: int = 24, k: int = 70, bias: bool = True) -> nn.Linear:
    torch.manual_seed(n * 1000 + k)
    return nn.Linear(k, n, bias=bias)


def quantized(config=FREE, bias: bool = True) -> QuantizedLinear:
    return QuantizedLinear.from_linear(random_linear(bias=bias), config)


class Conv1D(nn.Module):
    """As transformers has it for GPT-2: the weight is `[K, N]`."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.lm_head = nn.Embedding(40, 64), nn.Linear(64, 64), nn.Linear(64, 40, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.body(self.embed(ids)))


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
def test_replace_linear_reports_shapes_bits_and_errors(config):
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8, bias=False)).eval()
    before = {"0": model[0].weight.detach().clone(), "2": model[2].weight.detach().clone()}
    report = replace_linear(model, config)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        error = (module.weight_record.dequantize() - before[layer.name]).norm() / before[layer.name].norm()
        assert layer.relative_error == pytest.approx(error.item(), rel=1e-4)
        assert layer.bits_per_weight == module.weight_record.bits_per_weight
        assert not module.training
    assert report.percent == 100
    assert report.linear_parameters == 64 * 48 + 48 * 8
    assert "2 layers quantized: 100.0%" in str(report)
    assert report.to_dict()["percent"] == 100


def test_nan_leaves_the_model_unchanged_and_names_the_layer():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[3, 4] = float("nan")
    with pytest.raises(ArgumentError, match="1: its weight holds NaN"):
        replace_linear(model, FREE)
    assert all(type(module) is nn.Linear for module in model)


def test_an_error_half_way_leaves_the_model_unchanged(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    failing = []

    def quantize_once(weight, config):
        if failing:
            raise ArgumentError("cannot")
        failing.append(1)
        return real(weight, config)

    real = lutgemm.nn.quantize
    monkeypatch.setattr(lutgemm.nn, "quantize", quantize_once)
    with pytest.raises(ArgumentError, match=r"^1: cannot"):
        replace_linear(model, FREE)
    assert all(type(module) is nn.Linear for module in model)


def test_meta_weights_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ArgumentError, match="meta device"):
        replace_linear(model, FREE)


def test_a_bare_linear_is_refused_with_the_remedy():
    with pytest.raises(ArgumentError, match="from_linear"):
        replace_linear(nn.Linear(64, 64), FREE)


def test_tied_weights_are_left_alone_and_named():
    model = Tied()
    report = replace_linear(model, FREE, skip=())
    assert [entry.name for entry in report.layers] == ["body"]
    assert [(entry.name, entry.reason) for entry in report.skipped] == [
        ("lm_head", "its weight is shared with embed.weight")
    ]
    assert model.lm_head.weight is model.embed.weight
    assert report.percent == pytest.approx(100 * 64 * 64 / (64 * 64 + 40 * 64))


def test_one_module_under_two_names_stays_one_module():
    linear = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": linear, "b": linear, "c": nn.Linear(64, 64)})
    report = replace_linear(model, FREE)
    assert [entry.name for entry in report.layers] == ["c"]
    assert model["a"] is model["b"]


def test_what_a_swap_would_break_is_left_alone_and_named():
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {
            "own": Scaled(64, 64),
            "hooked": nn.Linear(64, 64),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
            "attention": nn.MultiheadAttention(64, 4),
            "experts": nn.ParameterDict({"up": nn.Parameter(torch.randn(4, 32, 64))}),
            "conv": nn.Conv1d(8, 8, 3),
            "norm": nn.LayerNorm(64),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    report = replace_linear(model, FREE)
    assert report.layers == ()
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons.pop("own") == "Scaled has a forward of its own"
    assert "hooks" in reasons.pop("hooked")
    assert reasons.pop("normed") == "its weight is parametrized"
    assert "MultiheadAttention" in reasons.pop("attention.out_proj")
    assert reasons.pop("attention.in_proj_weight") == "bare parameter of MultiheadAttention"
    assert reasons.pop("experts.up") == "fused 3-D parameter of ParameterDict"
    assert not [name for name in reasons if not name.startswith("normed")]
    assert "left as it is: fused 3-D parameter" in str(report)


def test_a_transformer_encoder_computes_what_its_weights_say():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 64)
    dense = copy.deepcopy(model)
    replace_linear(model, FREE)
    assert lutgemm.set_accuracy(model, "exact") == 2
    with torch.no_grad():
        for name in ("layers.0.linear1", "layers.0.linear2"):
            dense.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
        torch.testing.assert_close(model(x), dense(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_in_eval_mode_calls_its_quantized_layers(masked):
    """torch's fused kernel for it would read their dense weights."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 2).eval()
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    x, calls = torch.randn(2, 5, 64), []
    report = replace_linear(model, FREE)
    lutgemm.set_accuracy(model, "exact")
    for name in (entry.name for entry in report.layers):
        layer = model.get_submodule(name)
        layer.run = lambda *args, own=layer.run: calls.append(1) or own(*args)
    with torch.no_grad():
        y = model(x, src_key_padding_mask=mask)
        assert len(calls) == len(report.layers) == 4
        expected = copy.deepcopy(model).train()
        for module in expected.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        z = expected(x, src_key_padding_mask=mask)
    real = slice(None) if mask is None else ~mask
    torch.testing.assert_close(y[real], z[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("lm_head", {"lm_head"}),
        ("q_proj", {"model.layers.0.q_proj", "model.layers.10.q_proj"}),
        ("layers.1", {"model.layers.1.mlp"}),
        ("model", {"model.layers.0.q_proj", "model.layers.1.mlp", "model.layers.10.q_proj"}),
        ("proj", set()),
    ],
)
def test_skip_names_runs_of_dotted_parts(entry, names):
    everything = ["lm_head", "model.layers.0.q_proj", "model.layers.1.mlp", "model.layers.10.q_proj"]
    selection = Selection.of(entry)
    assert {name for name in everything if selection.reason_to_skip(name)} == names


def test_include_and_exclude_are_regular_expressions():
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q_proj", "k_proj", "gate", "lm_head")})
    report = replace_linear(model, FREE, include=["_proj$", "head"], exclude="^k_")
    assert [entry.name for entry in report.layers] == ["q_proj"]
    assert {entry.name: entry.reason for entry in report.skipped} == {
        "k_proj": "exclude matches it ('^k_')",
        "gate": "include does not match it",
        "lm_head": "skip names 'lm_head'",
    }


def test_bad_selections_are_refused():
    with pytest.raises(ArgumentError, match=r"include='\('.*regular expression"):
        Selection.of(include="(")
    with pytest.raises(ArgumentError, match="skip="):
        Selection.of(skip=(3,))


def test_replacing_twice_takes_the_rest():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    replace_linear(model, FREE, include="a")
    report = replace_linear(model, CODEBOOK)
    assert [entry.name for entry in report.layers] == ["b"]
    assert isinstance(model["a"], BCQLinear)
    assert isinstance(model["b"], CodebookLinear)


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
