"""Converting checkpoints: what is written, what is left alone, what is reported, and how much memory it takes."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import tiny_checkpoints as tiny
import torch
import transformers
from safetensors import safe_open

import lutgemm
from lutgemm import ArgumentError, BCQConfig, CheckpointError, CodebookConfig
from lutgemm.checkpoint import quantize_checkpoint, small_files
from lutgemm.checkpoint.estimate import dry_run
from lutgemm.checkpoint.inspection import inspect_checkpoint
from lutgemm.checkpoint.plan import Options
from lutgemm.checkpoint.verification import verify_checkpoint
from lutgemm.cli import main
from lutgemm.formats import weight_from_state
from lutgemm.integrations.quantization_config import parse
from lutgemm.quantize import quantize, weight_error

RTN = BCQConfig(bits=3, group_size=32, method="rtn")
CODEBOOK = CodebookConfig(vec_len=4, codebook_bits=4, group_size=32, iters=2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("llama") / "src", sharded=True, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory):
    dst = tmp_path_factory.mktemp("converted") / "dst"
    return dst, quantize_checkpoint(llama, dst, RTN, progress=False)


def record(dst, module):
    state = {
        name.removeprefix(f"{module}."): tensor
        for name, tensor in tiny.tensors(dst).items()
        if name.startswith(f"{module}.") and not name.endswith(".bias")
    }
    entry = parse(json.loads((dst / "config.json").read_text())["quantization_config"])
    return weight_from_state(entry.layers[module]["format"], state)


@pytest.mark.parametrize("config", [RTN, CODEBOOK], ids=["bcq", "codebook"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "opt", "gpt2", "gpt2-base"])
def test_every_linear_layer_becomes_its_quantized_record(kind, config, tmp_path):
    src = tiny.make(tmp_path / "src", kind.removesuffix("-base"), torch.float16)
    if kind == "gpt2-base":
        # As on the hub: saved from the base model, so that the names lack the prefix "transformer.".
        prefix = "transformer."
        tiny.rewrite(src, lambda s: [s.update({n.removeprefix(prefix): s.pop(n)}) for n in list(s)])
    dst = tmp_path / "dst"
    quantize_checkpoint(src, dst, config, progress=False)
    weights = tiny.linear_weights(src)
    del weights["lm_head"]
    entry = parse(json.loads((dst / "config.json").read_text())["quantization_config"])
    assert entry.layers.keys() == weights.keys()
    assert entry.config == config
    for module, weight in weights.items():
        expected = quantize(weight, config).state_dict()
        found = record(dst, module).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), module
    before, after = tiny.tensors(src), tiny.tensors(dst)
    linear_names = {name for module in weights for name in (f"{module}.weight", f"{module}.weight".split(".", 1)[1])}
    for name, tensor in before.items():
        if name not in linear_names:
            full = name if name in after else f"transformer.{name}"
            assert torch.equal(after[full], tensor), name
            assert after[full].dtype == tensor.dtype


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "opt", "gpt2-base", "mixtral"])
def test_loaded_model_computes_with_the_quantized_weights(kind, tmp_path):
    """The logits are those of the original model with every quantized weight replaced by its dequantized form."""
    src = tiny.make(tmp_path / "src", kind.removesuffix("-base"), sharded=kind == "llama")
    if kind == "gpt2-base":
        tiny.rewrite(src, lambda s: [s.update({n.removeprefix("transformer."): s.pop(n)}) for n in list(s)])
    dst = tmp_path / "dst"
    report = quantize_checkpoint(src, dst, RTN, progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(src)
    for layer in report["layers"]:
        module = model.get_submodule(layer["module"])
        weight = record(dst, layer["module"]).dequantize()
        module.weight.data = weight if isinstance(module, torch.nn.Linear) else weight.T
    loaded = lutgemm.load(dst).eval()
    lutgemm.set_accuracy(loaded, "exact")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected, found = model.eval()(tokens).logits, loaded(tokens).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_shards_keep_their_names_and_the_index_tells_the_truth(llama, converted):
    dst, _ = converted
    names = sorted(path.name for path in llama.glob("*.safetensors"))
    assert len(names) > 1
    assert sorted(path.name for path in dst.glob("*.safetensors")) == names
    index = json.loads((dst / "model.safetensors.index.json").read_text())
    found = {}
    for name in names:
        with safe_open(dst / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= dict.fromkeys(file.keys(), name)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tiny.tensors(dst).values())
    assert not (dst / "lutgemm-state.json").exists()
    assert not [path for path in dst.iterdir() if path.name.startswith(".")]


def test_report_totals_are_the_sums_of_what_is_on_disk(llama, converted):
    dst, report = converted
    assert json.loads((dst / "report.json").read_text()) == report
    weights = tiny.linear_weights(llama)
    head = weights.pop("lm_head")
    count = sum(weight.numel() for weight in weights.values())
    errors = {module: weight_error(weight, record(dst, module)) for module, weight in weights.items()}
    totals = report["totals"]
    assert totals["layers"] == len(weights) == 7
    assert totals["quantized_weights"] == count
    assert totals["coverage_percent"] == pytest.approx(100 * count / (count + head.numel()))
    records = sum(record(dst, module).nbytes for module in weights)
    assert totals["bits_per_quantized_weight"] == pytest.approx(8 * records / count)
    kept = sum(t.numel() * t.element_size() for name, t in tiny.tensors(llama).items() if name[:-7] not in weights)
    everything = sum(t.numel() for t in tiny.tensors(llama).values())
    assert totals["bits_per_weight_of_model"] == pytest.approx(8 * (records + kept) / everything)
    assert totals["bytes_after"] == sum(path.stat().st_size for path in dst.glob("*.safetensors"))
    assert totals["bytes_before"] == sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    error, norm = map(sum, zip(*errors.values(), strict=True))
    assert totals["relative_error"] == pytest.approx(math.sqrt(error / norm))
    for layer in report["layers"]:
        error, norm = errors[layer["module"]]
        assert layer["relative_error"] == pytest.approx(math.sqrt(error / norm))
        assert layer["sqnr_db"] == pytest.approx(10 * math.log10(norm / error))
        assert layer["bits_per_weight"] == record(dst, layer["module"]).bits_per_weight
    [left] = report["left_alone"]
    assert left["name"] == "lm_head"
    assert "--lm-head" in left["reason"]


def test_report_and_card_for_people(converted):
    dst, report = converted
    text = (dst / "report.md").read_text()
    for layer in report["layers"]:
        assert f"| {layer['module']} | {layer['shape'][0]} x {layer['shape'][1]} |" in text
    assert "lm_head" in text
    card = (dst / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: lutgemm" in front
    assert "base_model_relation: quantized" in front
    assert 'base_model: "src"' in front
    assert card.index("import lutgemm") < card.index("from_pretrained")


def test_tied_weights_are_never_quantized_alone(tmp_path):
    src = tiny.make(tmp_path / "src", tie_word_embeddings=True)
    report = quantize_checkpoint(src, tmp_path / "dst", RTN, lm_head=True, progress=False)
    [left] = report["left_alone"]
    assert (left["name"], left["reason"]) == ("lm_head", "tied to model.embed_tokens.weight")
    assert report["totals"]["coverage_percent"] == 100
    name = "model.embed_tokens.weight"
    assert torch.equal(tiny.tensors(tmp_path / "dst")[name], tiny.tensors(src)[name])


def test_untied_head_on_demand(tmp_path):
    src = tiny.make(tmp_path / "src")
    report = quantize_checkpoint(src, tmp_path / "dst", RTN, lm_head=True, progress=False)
    assert report["left_alone"] == []
    assert record(tmp_path / "dst", "lm_head").shape == (48, 64)


def test_include_exclude_and_overrides(tmp_path):
    src = tiny.make(tmp_path / "src")
    report = quantize_checkpoint(
        src,
        tmp_path / "dst",
        RTN,
        include=["mlp", "q_proj"],
        exclude=["gate_proj"],
        modules=[("down_proj", {"bits": 5}), ("q_proj", CODEBOOK.to_dict())],
        progress=False,
    )
    layouts = {layer["module"].split(".")[-1]: layer["layout"] for layer in report["layers"]}
    assert layouts.keys() == {"q_proj", "up_proj", "down_proj"}
    assert (layouts["up_proj"]["bits"], layouts["down_proj"]["bits"]) == (3, 5)
    assert layouts["q_proj"]["format"] == "codebook"
    reasons = {item["name"].split(".")[-1]: item["reason"] for item in report["left_alone"]}
    assert reasons["gate_proj"] == "excluded by --exclude"
    assert reasons["k_proj"] == "not matched by --include"
    assert verify_checkpoint(tmp_path / "dst", src, progress=False)["ok"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"modules": [("x", {"bits": 99})]}, "bits=99"),
        ({"modules": [("x", {"colour": 1})]}, "colour"),
        ({"modules": [("x", {"nested_bits": 3})]}, "modules: 'x'"),
        ({"include": ["("]}, "include: '('"),
        ({"device": "nonesuch"}, "device='nonesuch'"),
    ],
)
def test_bad_options_are_refused(fields, text, tmp_path):
    src = tiny.make(tmp_path / "src")
    with pytest.raises(ArgumentError, match=text.replace("(", r"\(")):
        quantize_checkpoint(src, tmp_path / "dst", RTN, progress=False, **fields)
    assert not (tmp_path / "dst").exists()


def test_nothing_to_quantize_is_an_error(tmp_path):
    src = tiny.make(tmp_path / "src")
    with pytest.raises(CheckpointError, match="nothing to quantize"):
        quantize_checkpoint(src, tmp_path / "dst", RTN, exclude=["."], progress=False)


def test_fused_experts_are_named_and_count_against_coverage(tmp_path):
    src = tiny.make(tmp_path / "src", "mixtral")
    assert any(".experts.0." in name for name in tiny.tensors(src)), "on disk experts are one matrix each"
    report = quantize_checkpoint(src, tmp_path / "dst", RTN, progress=False)
    experts = {item["name"]: item["shape"] for item in report["left_alone"] if item["kind"] == "experts"}
    assert experts == {
        "model.layers.0.mlp.experts.gate_up_proj": [3, 192, 64],
        "model.layers.0.mlp.experts.down_proj": [3, 64, 96],
    }
    attention = 2 * 64 * 64 + 2 * 32 * 64
    linear = attention + 48 * 64 + 3 * 192 * 64 + 3 * 64 * 96
    assert report["totals"]["coverage_percent"] == pytest.approx(100 * attention / linear)
    assert "NOT quantized" in (tmp_path / "dst" / "report.md").read_text()
    assert "NOT quantized" in (tmp_path / "dst" / "README.md").read_text()
    before, after = tiny.tensors(src), tiny.tensors(tmp_path / "dst")
    assert all(torch.equal(after[name], before[name]) for name in before if ".experts." in name)


def test_small_files_are_copied_and_other_weights_are_not(tmp_path):
    src = tiny.make(tmp_path / "src")
    (src / "tokenizer.json").write_text('{"a": 1}')
    (src / "LICENSE").write_text("free")
    (src / "additional_chat_templates").mkdir()
    (src / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    for name in ("pytorch_model.bin", "model.gguf", "training_args.pt", "consolidated.safetensors"):
        (src / name).write_bytes(b"weights")
    quantize_checkpoint(src, tmp_path / "dst", RTN, progress=False)
    names = {str(path.relative_to(tmp_path / "dst")) for path in (tmp_path / "dst").rglob("*") if path.is_file()}
    assert names == {
        "LICENSE",
        "README.md",
        "additional_chat_templates/tool.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "report.json",
        "report.md",
        "tokenizer.json",
    }
    assert (tmp_path / "dst" / "tokenizer.json").read_text() == '{"a": 1}'


def test_files_too_large_to_copy_are_reported(tmp_path, monkeypatch, capsys):
    src = tiny.make(tmp_path / "src")
    (src / "tokenizer.json").write_text(json.dumps({"vocab": "x" * 5000}))
    (src / "vocab.txt").write_text("a")
    monkeypatch.setattr(small_files, "LIMIT", 4000)
    assert main(["quantize", str(src), str(tmp_path / "dst"), "--method", "rtn", "--json", "-q"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == json.loads((tmp_path / "dst" / "report.json").read_text())
    assert report["not_copied"] == {"tokenizer.json": 5013}
    [line] = [line for line in captured.err.splitlines() if line.startswith("lutgemm: ")]
    assert "WARNING: tokenizer.json" in line
    assert "NOT copied" in line
    assert "tokenizer.json" in (tmp_path / "dst" / "report.md").read_text()
    assert not (tmp_path / "dst" / "tokenizer.json").exists()
    assert (tmp_path / "dst" / "vocab.txt").read_text() == "a"


def test_unknown_architecture_goes_by_names_and_shapes(tmp_path):
    src = tiny.make(tmp_path / "src")
    tiny.edit_json(src / "config.json", lambda config: config.update(model_type="of-my-own"))
    tiny.rewrite(src, lambda state: state.update({"model.layers.0.mlp.experts.0.w1.weight": torch.ones(64, 64)}))
    report = quantize_checkpoint(src, tmp_path / "dst", RTN, progress=False)
    assert "does not know model_type='of-my-own'" in report["layers_found_by"]
    assert report["totals"]["layers"] == 7
    assert {item["kind"] for item in report["left_alone"]} == {"head", "experts"}
    assert verify_checkpoint(tmp_path / "dst", src, progress=False)["ok"]


def test_transposed_architecture_is_not_guessed_without_transformers(tmp_path, monkeypatch):
    src = tiny.make(tmp_path / "src", "gpt2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match="transposed"):
        quantize_checkpoint(src, tmp_path / "dst", RTN, progress=False)


def test_dry_run_writes_nothing_and_bounds_the_result(llama, converted, tmp_path):
    _, report = converted
    before = tiny.digests(llama, skip=())
    estimate = dry_run(llama, Options(RTN))
    assert tiny.digests(llama, skip=()) == before
    totals = estimate["totals"]
    assert totals["layers"] == 7
    assert totals["coverage_percent"] == report["totals"]["coverage_percent"]
    assert totals["bits_per_quantized_weight_at_most"] >= report["totals"]["bits_per_quantized_weight"]
    assert totals["seconds"] > 0
    assert totals["peak_memory_bytes"] > 0
    assert sum(group["layers"] for group in estimate["groups"]) == 7


def test_inspect_agrees_with_the_report(converted):
    dst, report = converted
    seen = inspect_checkpoint(dst, values=True)
    assert seen["quant_method"] == "lutgemm"
    assert seen["formats"] == ["bcq"]
    assert {layer["module"]: layer["layout"] for layer in seen["layers"]} == {
        layer["module"]: layer["layout"] for layer in report["layers"]
    }
    assert seen["bits_per_quantized_weight"] == pytest.approx(report["totals"]["bits_per_quantized_weight"])
    assert seen["bits_per_weight_of_model"] == pytest.approx(report["totals"]["bits_per_weight_of_model"])
    assert seen["coverage_percent"] == report["totals"]["coverage_percent"]


def test_inspect_of_an_ordinary_checkpoint(llama):
    seen = inspect_checkpoint(llama)
    assert seen["quant_method"] is None
    assert seen["weights"] == sum(t.numel() for t in tiny.tensors(llama).values())


def _flip_code(state):
    name = next(name for name in sorted(state) if name.endswith(".codes"))
    state[name].view(-1)[0] ^= 1


def _change_norm(state):
    state["model.norm.weight"][0] += 1


def _drop_norm(state):
    del state["model.norm.weight"]


def _add(state):
    state["model.extra.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_flip_code, "squared error"),
        (_change_norm, "'model.norm.weight' differs"),
        (_drop_norm, "'model.norm.weight' of SRC is missing"),
        (_add, "'model.extra.weight' is in DST"),
    ],
)
def test_verify_finds_what_was_changed(change, problem, tmp_path):
    src = tiny.make(tmp_path / "src")
    dst = tmp_path / "dst"
    quantize_checkpoint(src, dst, RTN, progress=False)
    assert verify_checkpoint(dst, src, progress=False)["ok"]
    tiny.rewrite(dst, change)
    result = verify_checkpoint(dst, src, progress=False)
    assert not result["ok"]
    assert len(result["problems"]) == 1
    assert problem in result["problems"][0]


def test_verify_finds_a_false_report_and_another_source(tmp_path):
    src = tiny.make(tmp_path / "src")
    dst = tmp_path / "dst"
    quantize_checkpoint(src, dst, RTN, progress=False)
    tiny.edit_json(dst / "report.json", lambda report: report["layers"][0].update(squared_error=1.0))
    assert "report.json says 1" in verify_checkpoint(dst, src, progress=False)["problems"][0]
    (dst / "report.json").unlink()
    result = verify_checkpoint(dst, src, progress=False)
    assert result["ok"]
    assert not result["report_compared"]
    other = tmp_path / "other"
    shutil.copytree(src, other)
    tiny.rewrite(other, lambda state: state["model.embed_tokens.weight"].mul_(2))
    assert "'model.embed_tokens.weight' differs" in verify_checkpoint(dst, other, progress=False)["problems"][0]
