"""Damaged or hostile models: one line and exit 1 from every verb, never a wrong model in silence."""

import json
import math
import shutil
import time

import pytest
import tiny_checkpoints as tiny
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from test_eval import TEXT, char_tokenizer, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

import lutgemm
from lutgemm import ArgumentError, BCQConfig, CheckpointError, FormatError, LutgemmError
from lutgemm.checkpoint import quantize_checkpoint
from lutgemm.checkpoint.json_file import parse_object
from lutgemm.cli import main
from lutgemm.cli.generate import decode_after

NORM = "model.norm.weight"
IDS = torch.arange(12).view(2, 6) + 5
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A dense checkpoint `src` and what `quantize` makes of it, `dst`."""
    folder = tmp_path_factory.mktemp("template")
    tiny_llama().save_pretrained(folder / "src")
    char_tokenizer().save_pretrained(folder / "src")
    config = BCQConfig(bits=4, group_size=32, method="rtn")
    quantize_checkpoint(folder / "src", folder / "dst", config, progress=False)
    return folder


@pytest.fixture
def source(template, tmp_path):
    return shutil.copytree(template / "src", tmp_path / "src")


@pytest.fixture
def quantized(template, tmp_path):
    return shutil.copytree(template / "dst", tmp_path / "dst")


def plain(folder, **options):
    """What a user of transformers calls."""
    return AutoModelForCausalLM.from_pretrained(folder, **options)


LOADERS = {"load": lutgemm.load, "from_pretrained": plain}
both = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@both
@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight", "lm_head.weight"])
def test_a_missing_dense_tensor_is_refused(load, name, quantized):
    assert load(quantized).training is False
    tiny.rewrite(quantized, lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{name}' is missing .* again"):
        load(quantized)


@both
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_dense_tensor_that_is_not_finite_is_refused(load, value, quantized):
    tiny.rewrite(quantized, lambda state: state[NORM].fill_(value))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {NORM} holds NaN or Inf .* again"):
        load(quantized)


def test_a_cast_that_overflows_is_refused(quantized):
    tiny.rewrite(quantized, lambda state: state[NORM].fill_(1e5))
    plain(quantized)
    with pytest.raises(CheckpointError, match=r"stored as F32, loaded as torch\.float16.*wider dtype"):
        plain(quantized, dtype=torch.float16)


def test_a_norm_is_missed_under_every_class_and_name(quantized):
    """Files of the model with a head, loaded without it or with another one."""
    tiny.rewrite(quantized, lambda state: state.pop(NORM))
    with pytest.raises(CheckpointError, match=r"'norm\.weight' is missing"):
        AutoModel.from_pretrained(quantized)
    with pytest.raises(CheckpointError, match=f"'{NORM}' is missing"):
        AutoModelForSequenceClassification.from_pretrained(quantized)


def test_gpt2_whose_files_lack_the_prefix(tmp_path):
    tiny.make(tmp_path / "src", "gpt2")
    tiny.rewrite(
        tmp_path / "src",
        lambda state: [state.update({n.removeprefix("transformer."): state.pop(n)}) for n in list(state)],
    )
    dst = tmp_path / "dst"
    quantize_checkpoint(tmp_path / "src", dst, BCQConfig(bits=4, group_size=32, method="rtn"), progress=False)
    assert torch.equal(plain(dst)(IDS).logits, lutgemm.load(dst)(IDS).logits)
    tiny.rewrite(dst, lambda state: state.pop("ln_f.weight"))
    with pytest.raises(CheckpointError, match=r"'transformer\.ln_f\.weight' is missing"):
        plain(dst)


def test_a_new_head_is_allowed_once(quantized, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(quantized, num_labels=3)
    assert model.score.weight.shape[0] == 3
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes|'score\.weight' has shape \[3, 64\]"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=5)
    if Version(transformers.__version__) >= Version("5.23"):
        other = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "saved", num_labels=5, ignore_mismatched_sizes=True
        )
        assert other.score.weight.shape[0] == 5
    tiny.rewrite(tmp_path / "saved", lambda state: state.pop("score.weight"))
    with pytest.raises(CheckpointError, match=r"'score\.weight' is missing"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], ["LlamaTokenizer"], ["GPT2LMHeadModel"]])
def test_without_a_known_architecture_no_head_is_new(architectures, quantized):
    tiny.edit_json(quantized / "config.json", lambda config: config.update(architectures=architectures))
    tiny.rewrite(quantized, lambda state: state.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing"):
        plain(quantized)


def test_layers_that_accelerate_offloads_are_checked_in_the_files(quantized):
    """What `device_map` puts beside a GPU into host memory is on the meta device when it comes to the checks."""
    accelerate = pytest.importorskip("accelerate")
    model = plain(quantized)
    logits, check = model(IDS).logits, model.hf_quantizer._process_model_after_weight_loading
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.get_parameter(NORM).is_meta
    check(model)
    assert torch.equal(model(IDS).logits, logits)
    tiny.rewrite(quantized, lambda state: state[NORM].fill_(math.nan))
    with pytest.raises(CheckpointError, match=f"{NORM} holds NaN or Inf"):
        check(model)
    tiny.rewrite(quantized, lambda state: [state[n].fill_(math.nan) for n in state if n.endswith("q_proj.scales")])
    with pytest.raises(
        FormatError, match=r"model\.safetensors: model\.layers\.0\.self_attn\.q_proj: .*scales holds NaN"
    ):
        check(model)


def test_quantizing_on_load_makes_nothing_up(source):
    config = lutgemm.LutgemmConfig(BCQConfig(bits=4, group_size=32, method="rtn"))
    tiny.rewrite(source, lambda state: state.pop(NORM))
    with pytest.raises(CheckpointError, match=f"'{NORM}' is missing"):
        plain(source, quantization_config=config)
    tiny.rewrite(source, lambda state: state.update({NORM: torch.full((64,), math.nan)}))
    with pytest.raises(CheckpointError, match=f"{NORM} holds NaN or Inf"):
        plain(source, quantization_config=config)


@both
@pytest.mark.parametrize("name", [NORM, "lm_head.weight"])
def test_a_dense_tensor_of_another_shape_is_refused(load, name, quantized):
    tiny.rewrite(quantized, lambda state: state.update({name: state[name][1:].clone()}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{name}' has shape .*config\.json"):
        load(quantized)


@both
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_refused(load, name, quantized, tmp_path):
    (quantized / name).rename(tmp_path / name)
    (quantized / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: is a link to .*, outside the checkpoint; replace the link"):
        load(quantized)


@both
def test_links_within_the_folder_and_to_it_are_followed(load, quantized, tmp_path):
    (quantized / "model.safetensors").rename(quantized / "weights.bin")
    (quantized / "model.safetensors").symlink_to("weights.bin")
    (tmp_path / "link").symlink_to(quantized)
    load(quantized)
    load(tmp_path / "link")


@both
@pytest.mark.parametrize("place", ["../{}", "/{}", "sub/../../{}"])
def test_an_index_that_leads_outside_is_refused(load, place, quantized, tmp_path):
    (quantized / "sub").mkdir()
    outside = tmp_path / "outside.safetensors"
    (quantized / "model.safetensors").rename(outside)
    name = place.format(outside.name if ".." in place else str(outside)[1:])
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(outside), name)}
    (quantized / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index.*outside the checkpoint|not a plain name inside the folder"):
        load(quantized)


@pytest.mark.parametrize("place", ["blobs", "other", "../models--c--d/blobs"])
def test_links_of_a_hub_cache(place, quantized, tmp_path, monkeypatch):
    """In a cache a snapshot holds links to the blobs of its repository, and may hold no others."""
    repository = tmp_path / "hub" / "models--a--b"
    snapshot, store = repository / "snapshots" / COMMIT, repository / place
    snapshot.mkdir(parents=True)
    store.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for path in list(quantized.iterdir()):
        if path.is_file():
            path.rename(store / path.name)
            (snapshot / path.name).symlink_to(store / path.name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loads = [lambda: plain("a/b", cache_dir=tmp_path / "hub", local_files_only=True)]
    loads += [lambda: plain(snapshot), lambda: lutgemm.load(snapshot)]
    for load in loads:
        if place == "blobs":
            load()
        else:
            with pytest.raises(CheckpointError, match="outside the checkpoint"):
                load()


def test_load_of_a_dtype_or_device_that_is_none(quantized):
    for dtype in ("float33", "int8", torch.int8, 3):
        with pytest.raises(ArgumentError, match=r"dtype=.* is not a floating dtype"):
            lutgemm.load(quantized, dtype=dtype)
    for device in ("nosuch", "cuda:99"):
        with pytest.raises(ArgumentError, match=r"device=.* cannot be used here"):
            lutgemm.load(quantized, device=device)
    assert lutgemm.load(quantized, dtype="bfloat16", device="cpu").dtype == torch.bfloat16


HOSTILE_VALUES = {
    "hidden size of text": {"hidden_size": "64"},
    "hidden size of a list": {"hidden_size": [64]},
    "huge hidden size": {"hidden_size": 10**12},
    "hidden size beyond int64": {"hidden_size": 10**30},
    "huge vocabulary": {"vocab_size": 10**12},
    "vocabulary beyond int64": {"vocab_size": 10**30},
    "another vocabulary": {"vocab_size": 10**6},
    "huge intermediate size": {"intermediate_size": 10**12},
    "huge layer count": {"num_hidden_layers": 10**9},
    "negative layer count": {"num_hidden_layers": -1},
    "huge label count": {"num_labels": 10**10},
    "no heads": {"num_attention_heads": 0},
    "heads of null": {"num_attention_heads": None},
    "huge head": {"head_dim": 10**12},
    "activation": {"hidden_act": "nosuch"},
    "activation of a number": {"hidden_act": 3},
    "another model": {"model_type": "gpt2"},
    "another model and class": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    "unknown model": {"model_type": "nosuch", "architectures": None},
    "model of a list": {"model_type": ["llama"], "architectures": None},
    "code of its own": {
        "model_type": "own",
        "architectures": None,
        "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"},
    },
    "dtype": {"dtype": "nosuch"},
    "dtype of a number": {"dtype": 5},
    "rope": {"rope_parameters": {"rope_type": "nosuch"}},
    "rope of text": {"rope_parameters": "x"},
    "layers deep in a list": {"text_config": [{"num_hidden_layers": 10**9}]},
    "quantization of a list": {"quantization_config": [1]},
    "quantization of null": {"quantization_config": None},
    "layers of null": {"quantization_config": {"quant_method": "lutgemm", "format_version": 1}},
    "other weights": {"transformers_weights": "../nosuch.safetensors"},
    "other files": {"transformers_weights": 7},
}


@pytest.mark.parametrize("change", HOSTILE_VALUES.values(), ids=HOSTILE_VALUES)
def test_load_of_a_hostile_config_is_our_error(change, quantized):
    tiny.edit_json(quantized / "config.json", lambda config: config.update(change))
    with pytest.raises(LutgemmError) as caught:
        lutgemm.load(quantized)
    message = str(caught.value)
    assert str(quantized) in message or "config.json" in message
    assert any(word in message for word in ("again", "make one with", "do not belong", "must be", "Do not use"))
    assert len(message) < 1500


HOSTILE_TEXTS = {
    "empty": b"",
    "not JSON": b"{",
    "not an object": b"[]",
    "text": b'"config"',
    "not UTF-8": b'{"a": "\xff"}',
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep lists": b'{"a":' + b"[" * 200 + b"]" * 200 + b"}",
    "twice": b'{"model_type": "llama", "model_type": "gpt2"}',
    "NaN": b'{"a": NaN}',
}


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
def test_load_of_a_config_that_is_no_config(text, quantized):
    (quantized / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json: .*; "):
        lutgemm.load(quantized)


BAD_CONFIGS = {
    "hidden size of text": {"hidden_size": "64"},
    "negative hidden size": {"hidden_size": -64},
    "huge vocabulary": {"vocab_size": 10**13},
    "no heads": {"num_attention_heads": 0},
    "architectures": {"architectures": 5},
    "activation": {"hidden_act": "nosuch"},
}


@pytest.mark.parametrize("change", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
@pytest.mark.parametrize("verb", ["eval", "generate"])
@pytest.mark.parametrize("which", ["source", "quantized"])
def test_a_hostile_config_is_one_line(which, verb, change, request, tmp_path, capsys):
    folder = request.getfixturevalue(which)
    tiny.edit_json(folder / "config.json", lambda config: config.update(change))
    (tmp_path / "text").write_text(TEXT)
    options = ["--text", str(tmp_path / "text"), "--context", "16"] if verb == "eval" else ["--prompt", "the"]
    code = main([verb, str(folder), *options])
    error = capsys.readouterr().err
    if change == BAD_CONFIGS["architectures"] and code == 0:
        return  # the auto class serves in place of a name that is none
    assert code == 1
    assert "lutgemm: error: " in error
    assert "Traceback" not in error


@pytest.mark.parametrize("which", ["source", "quantized"])
def test_truncated_weights_are_one_line(which, request, capsys):
    folder = request.getfixturevalue(which)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert main(["generate", str(folder), "--prompt", "the"]) == 1
    assert str(folder) in capsys.readouterr().err


def test_a_deep_config_is_one_line(source, capsys):
    (source / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)
    assert main(["generate", str(source), "--prompt", "the"]) == 1
    assert "nested deeper" in capsys.readouterr().err


def test_a_number_beyond_floats_is_refused_before_any_work(source, tmp_path, capsys):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config)[:-1] + ', "extra": 1e999}')
    assert main(["quantize", str(source), str(tmp_path / "dst"), "--group-size", "32"]) == 1
    assert "1e999 is too large" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_many_keys_take_no_quadratic_time():
    keys = ",".join(f'"k{i}":1' for i in range(200_000))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="appears twice"):
        parse_object(f'{{{keys},"k199999":2}}'.encode(), "file", "remedy")
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("device", ["nonesuch", "cuda:99"])
def test_dry_run_checks_the_device(source, device, capsys):
    assert main(["quantize", str(source), "--dry-run", "--device", device, "--group-size", "32"]) == 1
    assert f"device='{device}' is not available" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--module", "dwn_proj=bits:2"], ["--include", "nosuch"], ["--exclude", "nosuch"]])
def test_a_pattern_that_matches_nothing_is_refused(source, option, tmp_path, capsys):
    assert main(["quantize", str(source), str(tmp_path / "dst"), "--group-size", "32", *option]) == 1
    assert "matches no linear layer of this model; names look like 'model.layers.0." in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_resume_of_a_finished_folder_that_lost_a_file(source, quantized, capsys):
    command = [
        "quantize",
        str(source),
        str(quantized),
        "--bits",
        "4",
        "--group-size",
        "32",
        "--method",
        "rtn",
        "--resume",
    ]
    assert main(command) == 0
    (quantized / "model.safetensors").unlink()
    assert main(command) == 1
    assert "missing, though the conversion had ended" in capsys.readouterr().err


def test_the_card_does_not_depend_on_how_the_source_is_written(source, tmp_path):
    options = ["--bits", "2", "--group-size", "32", "--method", "rtn", "--quiet"]
    for number, src in enumerate((f"{source}", f"{source}/")):
        assert main(["quantize", src, str(tmp_path / str(number)), *options]) == 0
    assert (tmp_path / "0" / "README.md").read_bytes() == (tmp_path / "1" / "README.md").read_bytes()


def test_generated_text_keeps_its_first_space():
    vocab = {"<unk>": 0, "▁once": 1, "▁a": 2, "▁time": 3}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert tokenizer.decode([2, 3]) == "a time"
    assert decode_after(tokenizer, [1], [2, 3]) == " a time"
