"""Damaged or hostile models: one line and exit 1 from every verb, never a wrong model in silence."""

import json
import math

import pytest
import tiny_checkpoints as tiny
import torch
import transformers
from hostile_folders import both_checkpoints, copied_result, copied_source
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import lutgemm
from lutgemm import ArgumentError, BCQConfig, CheckpointError, FormatError
from lutgemm.checkpoint import quantize_checkpoint

template = pytest.fixture(scope="module")(both_checkpoints)
source = pytest.fixture(copied_source)
quantized = pytest.fixture(copied_result)

NORM = "model.norm.weight"
IDS = torch.arange(12).view(2, 6) + 5
COMMIT = "0123456789" * 4


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
