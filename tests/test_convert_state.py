"""What an unfinished conversion left is checked: damaged, of other settings, of another machine."""

from __future__ import annotations

import pytest
import tiny_checkpoints as tiny
import torch
from stopped_conversions import RTN, result, source, stop_after, stopped_half_way

from lutgemm import BCQConfig, CheckpointError, CodebookConfig
from lutgemm.checkpoint import Options, quantize_checkpoint
from lutgemm.checkpoint.state import STATE_NAME, WORK_NAME, environment, locked
from lutgemm.checkpoint.verification import verify_checkpoint
from lutgemm.formats import BCQLayout

src = pytest.fixture(scope="module")(source)
whole = pytest.fixture(scope="module")(result)
half = pytest.fixture(stopped_half_way)

CODEBOOK = CodebookConfig(vec_len=4, codebook_bits=3, group_size=32, iters=1)


def _flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_damaged_leftovers_are_made_again(src, whole, half):
    pieces = sorted((half / WORK_NAME).glob("*.safetensors"))
    shards = sorted(half.glob("*.safetensors"))
    assert pieces or shards
    for path in (*pieces, *shards):
        _flip_byte(path)
    quantize_checkpoint(src, half, RTN, resume=True, progress=False)
    assert tiny.digests(half) == whole


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"state_version": 9}', b"\xff"])
def test_damaged_state_is_refused(content, src, half):
    (half / STATE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"lutgemm-state\.json.*delete the folder"):
        quantize_checkpoint(src, half, RTN, resume=True, progress=False)


DAMAGE = {
    "size": lambda shard: shard.update(size="many"),
    "sha256": lambda shard: shard.update(sha256="0"),
    "'size' is missing": lambda shard: shard.pop("size"),
    "'seconds' is missing": lambda shard: shard["layers"][0].pop("seconds"),
    "layers is not a list": lambda shard: shard.update(layers={}),
    "entry of a layer": lambda shard: shard["layers"].append(3),
    "entry of a layer:": lambda shard: shard["layers"][0].update(layout=None),
    "entry of a layer: ": lambda shard: shard["layers"][0].update(shape=[64]),
    "bits=99": lambda shard: shard["layers"][0]["layout"].update(bits=99),
    "format='x'": lambda shard: shard["layers"][0]["layout"].update(format="x"),
    "an error or time": lambda shard: shard["layers"][0].update(squared_error=-1),
    "nbytes": lambda shard: shard["layers"][0].update(nbytes=1),
    "module and tensor": lambda shard: shard["layers"][0].update(module=1),
}


def _a_shard_with_layers(state):
    return next(shard for shard in state["shards"].values() if shard["layers"])


@pytest.mark.parametrize(("text", "change"), DAMAGE.items(), ids=DAMAGE)
def test_damaged_entry_of_a_finished_shard_is_refused(text, change, src, half):
    tiny.edit_json(half / STATE_NAME, lambda state: change(_a_shard_with_layers(state)))
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(src, half, RTN, resume=True, progress=False)
    message = str(caught.value)
    assert message.startswith(f"{half / STATE_NAME}: damaged (shard 'model-0000")
    assert text in message
    assert "delete the folder and start again without --resume" in message


def _swap_layout(shard):
    layer = shard["layers"][0]
    other = BCQConfig(bits=4, group_size=32, method="rtn")
    layout = BCQLayout(*layer["shape"], other.bits, 32, "uniform", has_offsets=False)
    layer.update(layout=layout.to_dict(), nbytes=layout.nbytes, bits_per_weight=layout.bits_per_weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda shard: shard["layers"].clear(),
        lambda shard: shard["layers"].append(shard["layers"][0]),
        lambda shard: shard["layers"][0].update(module="model.layers.9.mlp.up_proj"),
        lambda shard: shard["layers"][0].update(tensor="model.norm.weight"),
        _swap_layout,
    ],
    ids=["none", "twice", "module", "tensor", "layout"],
)
def test_state_that_is_not_what_is_on_disk_or_planned_is_not_trusted(change, src, whole, half):
    tiny.edit_json(half / STATE_NAME, lambda state: change(_a_shard_with_layers(state)))
    quantize_checkpoint(src, half, RTN, resume=True, progress=False)
    assert tiny.digests(half) == whole
    assert verify_checkpoint(half, src, progress=False)["ok"]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("torch", "install torch 1.0"),
        ("lutgemm", "install lutgemm 1.0"),
        ("instruction set", "go back to a machine with 1.0"),
    ],
)
def test_another_environment_is_refused_with_both_values(name, remedy, src, half):
    now = environment(Options(RTN))
    tiny.edit_json(half / STATE_NAME, lambda state: state["environment"].update({name: "1.0"}))
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(src, half, RTN, resume=True, progress=False)
    assert f"{name} 1.0, now {name} is {now[name]}" in str(caught.value)
    assert remedy in str(caught.value)
    assert "--resume" in str(caught.value)


def test_thread_count_counts_for_codebooks_only(src, whole, half, tmp_path, monkeypatch):
    """BCQ holds torch to one thread, so its bytes are those of one thread on any number."""
    torch.set_num_threads(2)
    try:
        quantize_checkpoint(src, half, RTN, resume=True, progress=False)
        assert tiny.digests(half) == whole
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(src, tmp_path / "book", CODEBOOK, progress=False)
    finally:
        torch.set_num_threads(1)
    with pytest.raises(CheckpointError, match=r"threads 2, now threads is 1.*give --threads 2"):
        quantize_checkpoint(src, tmp_path / "book", CODEBOOK, resume=True, progress=False)
    assert "threads" in environment(Options(RTN, modules=(("x", CODEBOOK.to_dict()),)))
    assert "threads" not in environment(Options(RTN))


@pytest.mark.parametrize("verb", ["inspect", "eval", "generate", "verify"])
def test_unfinished_folder_is_named_as_such(verb, half, src, tmp_path, capsys):
    (tmp_path / "text").write_text("a text")
    more = {"inspect": [], "eval": ["--text", tmp_path / "text"], "generate": ["--prompt", "a"], "verify": [src]}
    message = tiny.refused(capsys, verb, half, *more[verb])
    assert f"{half}: holds an unfinished conversion" in message
    assert "--resume" in message


def test_unfinished_folder_needs_resume_and_the_same_settings(src, half):
    with pytest.raises(CheckpointError, match="--resume"):
        quantize_checkpoint(src, half, RTN, progress=False)
    with pytest.raises(CheckpointError, match="different config"):
        quantize_checkpoint(src, half, BCQConfig(bits=4, group_size=32), resume=True, progress=False)
    with pytest.raises(CheckpointError, match="different exclude"):
        quantize_checkpoint(src, half, RTN, exclude=["q_proj"], resume=True, progress=False)


def test_changed_source_is_not_mixed_in(src, half, tmp_path):
    other = tiny.make(tmp_path / "other", sharded=True)
    with pytest.raises(CheckpointError, match="changed SRC"):
        quantize_checkpoint(other, half, RTN, resume=True, progress=False)


def test_two_processes_do_not_write_one_folder(src, half):
    with locked(half), pytest.raises(CheckpointError, match="another lutgemm process"):
        quantize_checkpoint(src, half, RTN, resume=True, progress=False)
