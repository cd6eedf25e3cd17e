"""Damaged, hostile and mistaken input to the command line: one clear message, exit code 1, nothing half-written."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import load_file
from tiny_checkpoints import refused

from lutgemm import BCQConfig
from lutgemm.checkpoint import quantize_checkpoint
from lutgemm.cli import main

OPTIONS = ["--bits", "2", "--group-size", "32", "--method", "rtn", "-q"]
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def src(tmp_path):
    return tiny.make(tmp_path / "src")


def refused_source(capsys, src, *more) -> str:
    dst = src.parent / "dst"
    text = refused(capsys, "quantize", src, dst, *OPTIONS, *more)
    left = [path.name for path in dst.rglob("*") if not path.is_dir()] if dst.exists() else []
    assert not [name for name in left if name.endswith(".partial") or name in ("config.json", "README.md")], left
    return text


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def edit_header(path: Path, change) -> None:
    header, data = header_of(path)
    change(header)
    write_raw(path, json.dumps(header).encode(), data)


def _deep(entry):
    for _ in range(500):
        entry = {"x": entry}
    return entry


HEADERS = {
    "huge shape": (lambda h: h[WEIGHT].update(shape=[2**62, 2**62]), WEIGHT),
    "huge number": (lambda h: h[WEIGHT].update(shape=[10**400, 1]), WEIGHT),
    "negative size": (lambda h: h[WEIGHT].update(shape=[-96, -64]), "sizes >= 0"),
    "size not a number": (lambda h: h[WEIGHT].update(shape=["96", 64]), WEIGHT),
    "boolean size": (lambda h: h[WEIGHT].update(shape=[True, 64]), WEIGHT),
    "fractional size": (lambda h: h[WEIGHT].update(shape=[96.0, 64]), WEIGHT),
    "other shape": (lambda h: h[WEIGHT].update(shape=[96, 63]), "does not take"),
    "unknown dtype": (lambda h: h[WEIGHT].update(dtype="F7"), "'F7' is unknown"),
    "dtype of another size": (lambda h: h[WEIGHT].update(dtype="F16"), "does not take"),
    "dtype is a list": (lambda h: h[WEIGHT].update(dtype=["F32"]), WEIGHT),
    "offsets reversed": (lambda h: h[WEIGHT].update(data_offsets=h[WEIGHT]["data_offsets"][::-1]), "outside"),
    "negative offset": (lambda h: h[WEIGHT].update(data_offsets=[-4, 0]), "sizes >= 0"),
    "offset beyond the file": (lambda h: h[WEIGHT].update(data_offsets=[2**40, 2**40 + 96 * 64 * 4]), "outside"),
    "three offsets": (lambda h: h[WEIGHT].update(data_offsets=[0, 1, 2]), "two sizes"),
    "overlap": (
        lambda h: h[WEIGHT].update(data_offsets=h["model.layers.0.mlp.gate_proj.weight"]["data_offsets"]),
        "overlaps another tensor",
    ),
    "hole": (lambda h: h.pop(WEIGHT), "hole"),
    "entry is a list": (lambda h: h.update({WEIGHT: []}), WEIGHT),
    "entry is deep": (lambda h: h.update({WEIGHT: _deep({})}), "nested deeper"),
    "extra field": (lambda h: h[WEIGHT].update(code="x"), WEIGHT),
    "metadata is a list": (lambda h: h.update(__metadata__=[]), "__metadata__"),
    "metadata of numbers": (lambda h: h.update(__metadata__={"a": 1}), "__metadata__"),
    "name that is not Unicode": (lambda h: h.update({"\ud800": h.pop(WEIGHT)}), "not valid Unicode"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_header(case, src, capsys):
    change, text = HEADERS[case]
    edit_header(src / "model.safetensors", change)
    message = refused_source(capsys, src)
    assert "model.safetensors" in message
    assert text in message
    assert "download" in message


RAW = {
    "empty file": b"",
    "half a length": b"\x01\x02",
    "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "length of 2**64 - 1": b"\xff" * 8 + b"{}",
    "not JSON": struct.pack("<Q", 4) + b"{{{{",
    "not an object": struct.pack("<Q", 2) + b"[]",
    "not UTF-8": struct.pack("<Q", 4) + b"{\xff\xff}",
    "deep JSON": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a name twice": struct.pack("<Q", 15) + b'{"a":{},"a":{}}',
    "NaN": struct.pack("<Q", 9) + b'{"a":NaN}',
}


@pytest.mark.parametrize("case", RAW)
def test_files_that_are_no_safetensors(case, src, capsys):
    (src / "model.safetensors").write_bytes(RAW[case])
    assert "model.safetensors" in refused_source(capsys, src)
    assert "model.safetensors" in refused(capsys, "inspect", src)


def test_header_over_the_limit(src, capsys):
    """A sparse file: the header is refused by its length, nothing of it is read."""
    with (src / "model.safetensors").open("wb") as handle:
        handle.write(struct.pack("<Q", 100_000_001))
        handle.truncate(200_000_000)
    assert "at most 100000000 accepted" in refused_source(capsys, src)


@pytest.mark.parametrize("cut", [1, 1000, 30_000])
def test_truncated_file(cut, src, capsys):
    path = src / "model.safetensors"
    os.truncate(path, path.stat().st_size - cut)
    assert "truncated" in refused_source(capsys, src)


def test_bytes_after_the_last_tensor(src, capsys):
    with (src / "model.safetensors").open("ab") as handle:
        handle.write(b"more")
    assert "4 bytes after the last tensor" in refused_source(capsys, src)


def test_swapped_layers(src, capsys):
    def swap(state):
        other = "model.layers.0.mlp.down_proj.weight"
        state[WEIGHT], state[other] = state[other], state[WEIGHT]

    tiny.rewrite(src, swap)
    message = refused_source(capsys, src)
    assert "has shape" in message
    assert "another model" in message


def test_missing_tensor(src, capsys):
    tiny.rewrite(src, lambda state: state.pop("model.norm.weight"))
    assert "'model.norm.weight' is missing" in refused_source(capsys, src)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(name, value, src, capsys):
    def spoil(state):
        state[name].view(-1)[7] = value

    tiny.rewrite(src, spoil)
    message = refused_source(capsys, src)
    assert f"tensor {name!r} holds NaN or Inf" in message


def test_weight_of_integers(src, capsys):
    tiny.rewrite(src, lambda state: state.update({WEIGHT: state[WEIGHT].to(torch.int32)}))
    message = refused_source(capsys, src)
    assert "dtype I32" in message
    assert WEIGHT in message


CONFIGS = {
    "not JSON": (b"{", "not valid JSON"),
    "not an object": (b"[1]", "expected an object"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
    "deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper"),
    "rather deep": (b'{"a":' * 100 + b"1" + b"}" * 100, "nested deeper"),
    "too large": (b" " * (16 << 20) + b"{}", "larger than"),
    "no number": (b'{"a": Infinity}', "not valid JSON"),
    "a key twice": (b'{"a": 1, "a": 2}', "twice"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_config(case, src, capsys):
    content, text = CONFIGS[case]
    (src / "config.json").write_bytes(content)
    message = refused_source(capsys, src)
    assert "config.json" in message
    assert text in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("hidden_size", -64),
        ("hidden_size", "64"),
        ("hidden_size", 128),
        ("num_attention_heads", 0),
        ("intermediate_size", None),
    ],
)
def test_config_of_another_or_no_model(field, value, src, capsys):
    tiny.edit_json(src / "config.json", lambda config: config.update({field: value}))
    assert "config.json" in refused_source(capsys, src)


def test_quantized_source(src, capsys):
    quantize_checkpoint(src, src.parent / "q", BCQConfig(bits=2, group_size=32, method="rtn"), progress=False)
    message = refused_source(capsys, src.parent / "q")
    assert "already quantized" in message
    assert "original" in message


def test_missing_or_foreign_source(src, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dst = tmp_path / "dst"
    assert "no such folder" in refused(capsys, "quantize", tmp_path / "nowhere", dst, "-q")
    assert "no such folder" in refused(capsys, "quantize", "a/b/c", dst, "-q")
    assert "no such folder" in refused(capsys, "quantize", "../x", dst, "-q")
    assert "no such folder" in refused(capsys, "quantize", src / "config.json", dst, "-q")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, "quantize", tmp_path / "empty", dst, "-q")
    (src / "model.safetensors").rename(src / "pytorch_model.bin")
    message = refused_source(capsys, src)
    assert "pytorch_model.bin is not read" in message
    assert "save_pretrained" in message
    (src / "pytorch_model.bin").unlink()
    assert "weights are missing" in refused_source(capsys, src)


@pytest.fixture
def sharded(tmp_path):
    return tiny.make(tmp_path / "sharded", sharded=True)


def _first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def test_missing_shard(sharded, capsys):
    name = _first_shard(sharded).name
    (sharded / name).unlink()
    message = refused_source(capsys, sharded)
    assert name in message
    assert "shard missing" in message


def test_shard_that_is_a_copy_of_another(sharded, capsys):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    assert "is also in" in refused_source(capsys, sharded)


def test_shard_without_a_tensor_of_the_index(sharded, capsys):
    def change(index):
        index["weight_map"]["model.more.weight"] = _first_shard(sharded).name

    tiny.edit_json(sharded / "model.safetensors.index.json", change)
    assert "no shard has it" in refused_source(capsys, sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/../x.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        "x.bin",
        "",
    ],
)
def test_index_that_leads_outside(name, sharded, capsys):
    def change(index):
        index["weight_map"][next(iter(index["weight_map"]))] = name

    tiny.edit_json(sharded / "model.safetensors.index.json", change)
    assert "model.safetensors.index.json" in refused_source(capsys, sharded)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_index_without_a_map(content, sharded, capsys):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(content))
    assert "weight_map" in refused_source(capsys, sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_that_lead_outside(name, src, capsys, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    path = src / name
    if not path.exists():
        path.write_text("{}")
    path.rename(outside / name)
    path.symlink_to(outside / name)
    message = refused_source(capsys, src)
    assert name in message
    assert "outside the checkpoint" in message


def test_links_of_a_hub_cache_are_followed(src, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in list(src.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    assert main(["quantize", str(snapshot), str(tmp_path / "dst"), *OPTIONS]) == 0
    assert not [path for path in (tmp_path / "dst").iterdir() if path.is_symlink()]


@pytest.mark.parametrize("name", ["same", "dots", "link"])
def test_destination_that_is_the_source(name, src, capsys, tmp_path, monkeypatch):
    before = tiny.digests(src, skip=())
    monkeypatch.chdir(src)
    (tmp_path / "link").symlink_to(src)
    dst = {"same": src, "dots": Path("..") / "src", "link": tmp_path / "link"}[name]
    assert "is SRC itself" in refused(capsys, "quantize", src, dst, *OPTIONS)
    assert "is SRC itself" in refused(capsys, "quantize", src, dst, *OPTIONS, "--resume")
    assert tiny.digests(src, skip=()) == before


def test_destination_that_is_not_free(src, capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(capsys, "quantize", src, tmp_path / "file", *OPTIONS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    assert "not empty" in refused(capsys, "quantize", src, tmp_path / "full", *OPTIONS)
    assert "not empty" in refused(capsys, "quantize", src, tmp_path / "full", *OPTIONS, "--resume")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    assert "cannot be written" in refused(capsys, "quantize", src, tmp_path / "file" / "below", *OPTIONS)


def test_read_only_destination(src, capsys, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    folder = locked if os.geteuid() else Path("/proc")
    message = refused(capsys, "quantize", src, folder / "dst", *OPTIONS)
    assert str(folder / "dst") in message
    assert "cannot be written" in message


def test_checkpoint_of_another_method_is_only_described(src, capsys):
    tiny.edit_json(src / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"}))
    assert main(["inspect", str(src)]) == 0
    assert "'gptq', not lutgemm" in capsys.readouterr().out
    assert "already quantized" in refused_source(capsys, src)


def test_no_crash_of_the_interpreter(src, tmp_path):
    """The whole process, as a user runs it, on a file whose header lies about its size."""
    edit_header(src / "model.safetensors", HEADERS["offset beyond the file"][0])
    command = [sys.executable, "-m", "lutgemm", "quantize", str(src), str(tmp_path / "dst"), *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("lutgemm: error: ")
    assert done.stdout == ""


def test_unaligned_and_empty_tensors_of_other_writers(src, tmp_path, capsys):
    """Valid, if unusual: tensors at odd offsets, and one without elements."""
    state = {name: tensor.clone() for name, tensor in load_file(src / "model.safetensors").items()}
    ordered = {"a.flag": torch.ones(3, dtype=torch.uint8), "a.none": torch.empty(0, 4)} | state
    header, blob = {}, b""
    for name, tensor in ordered.items():
        raw = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        dtype = "U8" if tensor.dtype == torch.uint8 else "F32"
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    write_raw(src / "model.safetensors", json.dumps(header).encode(), blob)
    assert main(["quantize", str(src), str(tmp_path / "dst"), *OPTIONS]) == 0
    after = load_file(tmp_path / "dst" / "model.safetensors")
    assert all(torch.equal(after[name], ordered[name]) for name in ordered if name in after)
    assert "a.none" in after
