"""The swap of quantized layers into a model: what is taken, what is left alone and why."""

import copy

import pytest
import torch
from linear_models import CODEBOOK, CONFIGS, FREE, Tied
from torch import nn

import lutgemm
from lutgemm.errors import ArgumentError
from lutgemm.nn import BCQLinear, CodebookLinear, Selection, replace_linear


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
