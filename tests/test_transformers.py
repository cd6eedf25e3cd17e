"""transformers: quantize on load, save, reload, generate, casts, on tiny random models; and what loading refuses."""

import copy
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import lutgemm
from lutgemm.errors import ArgumentError, CheckpointError, FormatError
from lutgemm.nn import QuantizedLinear, replace_linear

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

BCQ = lutgemm.BCQConfig(bits=4, group_size=32, scale_kind="free", method="greedy")
CODEBOOK = lutgemm.CodebookConfig(codebook_bits=5, group_size=32, iters=1)
FORMATS = {"bcq": BCQ, "codebook": CODEBOOK}

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 16}
MODELS = {
    "llama": (transformers.LlamaConfig(**GROUPED), 7),
    "llama-tied": (transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True), 7),
    "qwen2": (transformers.Qwen2Config(**GROUPED), 7),
    "qwen3": (transformers.Qwen3Config(**GROUPED), 7),
    "mistral": (transformers.MistralConfig(**GROUPED), 7),
    "gemma": (transformers.GemmaConfig(**GROUPED), 7),
    "opt": (transformers.OPTConfig(**COMMON, ffn_dim=96, word_embed_proj_dim=64), 6),
    "gpt2": (transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64), 4),
    "phi": (transformers.PhiConfig(**COMMON), 6),
}
"""Name -> configuration, linear layers per block. Embeddings are tied in llama-tied, gemma, opt and gpt2."""

IDS = torch.arange(12).view(2, 6) + 5


def dense_model(name: str = "llama"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name][0])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def quantized_layers(model) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a saved dense model, by name."""
    folders = {}

    def save(name: str = "llama") -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            dense_model(name).save_pretrained(folders[name])
        return folders[name]

    return save


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A lutgemm checkpoint of the tiny Llama, in one file or in shards."""
    model = dense_model()
    replace_linear(model, CODEBOOK)
    folders = {sharded: tmp_path_factory.mktemp("quantized") for sharded in (False, True)}
    for sharded, folder in folders.items():
        model.save_pretrained(folder, max_shard_size="30KB" if sharded else "1GB")
    return folders


@pytest.fixture
def checkpoint(template, tmp_path):
    """A copy of the template, free to be damaged."""

    def make(sharded: bool = False) -> Path:
        return shutil.copytree(template[sharded], tmp_path / "quantized")

    return make


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS)
def test_quantize_save_reload_generate(name, config, saved, tmp_path):
    source = dense_model(name)
    on_load = AutoModelForCausalLM.from_pretrained(saved(name), quantization_config=lutgemm.LutgemmConfig(config))
    layers = quantized_layers(on_load)
    assert len(layers) == 2 * MODELS[name][1]
    assert on_load.is_quantized
    assert not any(isinstance(m, nn.Linear) for n, m in on_load.named_modules() if n != "lm_head")
    for layer_name, layer in layers.items():
        assert type(layer.bias) is type(source.get_submodule(layer_name).bias)
        if layer.bias is not None:
            assert torch.equal(layer.bias, source.get_submodule(layer_name).bias)
    y = logits(on_load)

    replace_linear(source, config)
    assert torch.equal(logits(source), y)

    on_load.save_pretrained(tmp_path)
    again = lutgemm.load(tmp_path)
    assert not again.training
    assert torch.equal(logits(again), y)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), y)
    if MODELS[name][0].tie_word_embeddings:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight

    tokens = again.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > IDS.shape[1]
    assert torch.equal(
        tokens, on_load.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    )

    records = {n: layer.weight_record.state_dict() for n, layer in quantized_layers(again).items()}
    records = {n: {key: tensor.clone() for key, tensor in record.items()} for n, record in records.items()}
    in_bf16 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    again.to(torch.bfloat16)
    for model in (again, in_bf16):
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16
        for layer_name, layer in quantized_layers(model).items():
            for key, tensor in layer.weight_record.tensors.items():
                assert tensor.dtype == records[layer_name][key].dtype
                assert torch.equal(tensor, records[layer_name][key])
        assert logits(model).dtype == torch.bfloat16
        assert (logits(model).float() - y).norm() / y.norm() < 0.05


def test_a_replaced_model_saves_itself_as_a_checkpoint(tmp_path):
    model = dense_model()
    replace_linear(model, BCQ, include="mlp")
    replace_linear(model, CODEBOOK)
    model.save_pretrained(tmp_path)
    again = lutgemm.load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert {type(layer).__name__ for layer in quantized_layers(again).values()} == {"BCQLinear", "CodebookLinear"}
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {layout["layout"]["format"] for layout in entry["layers"]} == {"bcq", "codebook"}
    assert entry["producer"] == f"lutgemm {lutgemm.__version__}"
    assert entry["format_version"] == 1


def test_shards_and_saving_twice(checkpoint, tmp_path):
    folder = checkpoint(sharded=True)
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = lutgemm.load(folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(lutgemm.load(tmp_path / "again")), logits(model))


def test_a_checkpoint_with_a_head_loads_into_the_base_model(checkpoint):
    folder = checkpoint()
    base = AutoModel.from_pretrained(folder)
    assert len(quantized_layers(base)) == 14
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, lutgemm.load(folder).model(IDS).last_hidden_state)


def test_selection_on_load(saved):
    def names(**options) -> set[str]:
        config = lutgemm.LutgemmConfig(CODEBOOK, **options)
        return set(quantized_layers(AutoModelForCausalLM.from_pretrained(saved(), quantization_config=config)))

    assert "lm_head" in names(skip=())
    assert names(include="layers.0.*q_proj") == {"model.layers.0.self_attn.q_proj"}
    assert len(names(skip=("mlp", "lm_head"))) == 8
    assert len(names(exclude=r"layers\.1\.")) == 7


def test_a_tied_head_stays_dense_whatever_is_asked(saved):
    config = lutgemm.LutgemmConfig(CODEBOOK, skip=())
    model = AutoModelForCausalLM.from_pretrained(saved("llama-tied"), quantization_config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dequantize_gives_the_architecture_back(saved, tmp_path):
    for name in ("llama", "gpt2"):
        model = AutoModelForCausalLM.from_pretrained(saved(name), quantization_config=lutgemm.LutgemmConfig(CODEBOOK))
        lutgemm.set_accuracy(model, "exact")
        y = logits(model)
        model.dequantize()
        assert quantized_layers(model) == {}
        torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / name)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), logits(model))


def test_fused_experts_are_named_and_survive(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**COMMON, num_key_value_heads=2, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "dense")
    with pytest.warns(RuntimeWarning, match=r"4 fused 3-D parameters.*experts\.gate_up_proj"):
        on_load = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=lutgemm.LutgemmConfig(CODEBOOK)
        )
    report = replace_linear(model, CODEBOOK)
    assert report.percent < 50
    assert "model.layers.1.mlp.experts.down_proj" in {entry.name for entry in report.skipped}
    on_load.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(lutgemm.load(tmp_path / "quantized")), logits(model))


def test_t5_reads_the_weight_attribute():
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)
    ).eval()
    replace_linear(model, CODEBOOK)
    model.to(torch.bfloat16)
    assert model(input_ids=IDS, decoder_input_ids=IDS).logits.dtype == torch.bfloat16


def test_scales_of_a_loaded_model_can_be_trained(checkpoint):
    model = lutgemm.load(checkpoint())
    layers = quantized_layers(model).values()
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())
    for layer in layers:
        layer.scales.requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    assert all(layer.scales.grad.abs().sum() > 0 for layer in layers)


IMPORT_ORDERS = {
    "lutgemm first": "import lutgemm, sys; assert 'transformers' not in sys.modules; import transformers",
    "transformers first": "import transformers, transformers.quantizers.auto; import lutgemm",
}


@pytest.mark.parametrize("imports", IMPORT_ORDERS.values(), ids=IMPORT_ORDERS)
def test_plain_from_pretrained_in_any_import_order(imports, checkpoint):
    code = (
        f"{imports}; m = transformers.AutoModelForCausalLM.from_pretrained({str(checkpoint())!r});"
        "print(type(m.model.layers[0].mlp.up_proj).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "CodebookLinear", result.stderr
    assert "RuntimeWarning" not in result.stderr


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


LAYER = "model.layers.1.mlp.up_proj"

BAD_CONFIGS = {
    "version": (lambda q: q.update(format_version=2), r"format_version 2 is unknown; .* reads \[1\]"),
    "no version": (lambda q: q.pop("format_version"), "format_version None is unknown"),
    "no layers": (lambda q: q.pop("layers"), "layers must be a list"),
    "unknown module": (lambda q: q["layers"][0]["modules"].append("model.layers.9.x"), "model.layers.9.x is listed"),
    "not linear": (lambda q: q["layers"][0]["modules"].append("model.norm"), "LlamaRMSNorm, not a linear layer"),
    "twice": (lambda q: q["layers"][0]["modules"].append(LAYER), "listed twice"),
    "unlisted": (lambda q: q["layers"][0]["modules"].remove(LAYER), f"{LAYER} is quantized, but config.json"),
    "layout": (lambda q: q["layers"][0]["layout"].update(vec_len=3), "vec_len=3"),
    "layout type": (lambda q: q["layers"][0]["layout"].update(group_size="x"), "group_size='x'"),
    "layout field": (lambda q: q["layers"][0]["layout"].update(secret=1), "unknown fields"),
    "format": (lambda q: q["layers"][0]["layout"].update(format="nf4"), "must name a format"),
    "other layout": (lambda q: q["layers"][0]["layout"].update(codebook_bits=6), r"codebooks is F16 \[1, 32, 4\]"),
    "config": (lambda q: q["config"].update(bits=3), "unknown fields"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_is_refused(case, checkpoint):
    change, message = BAD_CONFIGS[case]
    folder = checkpoint()
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


BAD_TENSORS = {
    "missing": (lambda t: t.pop(f"{LAYER}.codes"), rf"{LAYER}: \['codes'\] missing"),
    "extra": (lambda t: t.update({f"{LAYER}.weight": torch.zeros(96, 64)}), rf"{LAYER}: \['weight'\] stored beside"),
    "dtype": (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].float()}), f"{LAYER}.scales is F32"),
    "shape": (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][:-1].clone()}), r"F16 \[95, 2\]"),
    "nan": (lambda t: t[f"{LAYER}.scales"].fill_(float("nan")), f"safetensors: {LAYER}: .*scales holds NaN"),
    "codes": (lambda t: t[f"{LAYER}.codes"].fill_(32), f"safetensors: {LAYER}: .*32 centroids"),
    "header": (lambda t: t[f"{LAYER}.header"].fill_(7), f"safetensors: {LAYER}: .*header"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused(case, checkpoint):
    change, message = BAD_TENSORS[case]
    folder = checkpoint()
    edit_tensors(folder, change)
    with pytest.raises((CheckpointError, FormatError), match=message):
        lutgemm.load(folder)


def test_damaged_files_are_refused(checkpoint):
    folder = checkpoint(sharded=True)
    index = folder / "model.safetensors.index.json"
    shard = sorted(folder.glob("*.safetensors"))[1]
    content, listed = shard.read_bytes(), index.read_text()

    shard.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=f"{shard.name}: tensor .*truncated"):
        lutgemm.load(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: shard missing"):
        lutgemm.load(folder)
    shard.write_bytes(content)
    index.write_text(listed.replace(shard.name, f"../{shard.name}"))
    with pytest.raises(CheckpointError, match="not a plain name inside the folder"):
        lutgemm.load(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        lutgemm.load(folder)
    index.write_text(listed)
    lutgemm.load(folder)


def test_what_is_no_lutgemm_checkpoint_is_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"not a lutgemm checkpoint.*lutgemm quantize"):
        lutgemm.load(saved())
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        lutgemm.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        lutgemm.load(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        lutgemm.load(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="neither a folder nor a model that the Hub gives"):
        lutgemm.load(tmp_path / "no such folder")


def test_quantize_on_load_names_a_bad_weight(saved, tmp_path):
    model = dense_model()
    with torch.no_grad():
        model.get_submodule(LAYER).weight[3, 3] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=f"^{LAYER}: "):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=lutgemm.LutgemmConfig(BCQ))
    edit_tensors(tmp_path, lambda tensors: tensors.pop(f"{LAYER}.weight"))
    with pytest.raises(CheckpointError, match=f"no weight of 1 linear layers: {LAYER}"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=lutgemm.LutgemmConfig(BCQ))


def test_config_without_what_to_quantize_to_is_refused(saved):
    with pytest.raises(ArgumentError, match="needs a BCQConfig or a CodebookConfig"):
        AutoModelForCausalLM.from_pretrained(saved(), quantization_config=lutgemm.LutgemmConfig())
    with pytest.raises(ArgumentError, match="expected a BCQConfig"):
        lutgemm.LutgemmConfig(3)


def test_loading_warns_of_nothing(checkpoint):
    folder = checkpoint()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        lutgemm.load(folder)
