"""A conversion that is killed, interrupted or runs out of disk can go on, and ends with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_checkpoints as tiny
import torch

from lutgemm import BCQConfig, CheckpointError, CodebookConfig
from lutgemm.checkpoint import Options, atomic, convert, quantize_checkpoint
from lutgemm.checkpoint.state import STATE_NAME, WORK_NAME, environment, locked
from lutgemm.checkpoint.verification import verify_checkpoint
from lutgemm.formats import BCQLayout

RTN = BCQConfig(bits=3, group_size=32, method="rtn")
CODEBOOK = CodebookConfig(vec_len=4, codebook_bits=3, group_size=32, iters=1)


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("resume") / "src", sharded=True)


@pytest.fixture(scope="module")
def whole(src, tmp_path_factory):
    """The result of an uninterrupted conversion."""
    dst = tmp_path_factory.mktemp("whole") / "dst"
    quantize_checkpoint(src, dst, RTN, progress=False)
    return tiny.digests(dst)


KILLED_AT_EVERY_RENAME = """
import os, signal, sys
from pathlib import Path
import torch
from lutgemm import BCQConfig
from lutgemm.checkpoint import CheckpointFolder, Options, make_plan, quantize_checkpoint

src, dst, log = map(Path, sys.argv[1:])
config = BCQConfig(bits=3, group_size=32, method="rtn")
torch.set_num_threads(1)  # no OpenMP pool is made before the fork, so that children can compute
make_plan(CheckpointFolder(src), Options(config))  # imports transformers once, for all children
rename = Path.replace
log.touch()

def run(when, passed):
    def killing(path, target):
        key = f"{target.name}:{path.stat().st_size}"
        if key in passed:
            return rename(path, target)
        if when == "torn":
            os.truncate(path, path.stat().st_size // 2)
        if when == "after":
            rename(path, target)
            with log.open("a") as handle:
                handle.write(key + "\\n")
        os.kill(os.getpid(), signal.SIGKILL)
    Path.replace = killing
    quantize_checkpoint(src, dst, config, resume=True, progress=False)

def killed(when):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            run(when, log.read_text().split())
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    return os.WIFSIGNALED(status)

while True:
    names = {path.name for path in dst.glob("*")}
    loads = "config.json" in names and "model.safetensors.index.json" in names
    again = killed("torn" if len(log.read_text().split()) % 2 else "before")
    assert again == killed("after")
    if not again:
        break
    assert not loads, "a folder that loads was not complete"
"""


def test_killed_before_and_after_every_rename_it_ends_with_the_same_bytes(src, whole, tmp_path):
    """Each process of the chain is killed (SIGKILL) at its first rename: before it, with a torn file, or after it."""
    dst = tmp_path / "dst"
    log = tmp_path / "log"
    command = [sys.executable, "-c", KILLED_AT_EVERY_RENAME, str(src), str(dst), str(log)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    renamed = [line.rpartition(":")[0] for line in log.read_text().split()]
    shards = sorted(path.name for path in src.glob("*.safetensors"))
    assert [name for name in renamed if name in shards] == shards
    assert renamed.count(STATE_NAME) == 1 + len(shards)
    last = ["generation_config.json", "report.json", "report.md", "README.md", "config.json"]
    assert renamed[-6:] == [*last, "model.safetensors.index.json"]
    assert len(renamed) == 7 + len(shards) + 1 + len(shards) + 6
    assert tiny.digests(dst) == whole


SLOW = BCQConfig(bits=3, group_size=32, iters=60)


def _start(src, dst):
    """`lutgemm quantize` with the settings `SLOW`, in a process of its own, when its first layer is on disk."""
    options = ["--bits", "3", "--group-size", "32", "--iters", "60", "-q"]
    command = [sys.executable, "-m", "lutgemm", "quantize", str(src), str(dst), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not list((dst / WORK_NAME).glob("*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def slow_result(src, tmp_path_factory):
    """What `SLOW` writes when nothing disturbs it."""
    dst = tmp_path_factory.mktemp("slow") / "dst"
    quantize_checkpoint(src, dst, SLOW, progress=False)
    return tiny.digests(dst)


def test_killed_at_a_random_moment_it_goes_on(src, slow_result, tmp_path):
    dst = tmp_path / "dst"
    process = _start(src, dst)
    time.sleep(random.Random(0).random() * 0.5)
    process.kill()
    process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0)
    quantize_checkpoint(src, dst, SLOW, resume=True, progress=False)
    assert tiny.digests(dst) == slow_result


def test_interrupt_says_how_to_go_on(src, slow_result, tmp_path):
    dst = tmp_path / "dst"
    process = _start(src, dst)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert "interrupted" in stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert not (dst / "config.json").exists()
    assert not [path for path in dst.rglob("*") if atomic.is_partial(path)]
    quantize_checkpoint(src, dst, SLOW, resume=True, progress=False)
    assert tiny.digests(dst) == slow_result


def _stop_after(monkeypatch, layers):
    """Let the conversion fail with KeyboardInterrupt after so many layers."""
    done = []
    original = convert.quantize_layer

    def counted(*args):
        if len(done) == layers:
            raise KeyboardInterrupt
        done.append(args)
        return original(*args)

    monkeypatch.setattr(convert, "quantize_layer", counted)
    return done


@pytest.fixture
def half(src, tmp_path, monkeypatch):
    """A conversion that stopped after four of its seven layers."""
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        _stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(src, dst, RTN, progress=False)
    return dst


def test_finished_layers_are_not_computed_again(src, whole, half, monkeypatch):
    done = _stop_after(monkeypatch, 99)
    quantize_checkpoint(src, half, RTN, resume=True, progress=False)
    assert len(done) == 3
    assert tiny.digests(half) == whole


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
            _stop_after(patch, 2)
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


def test_finished_folder_is_checked_before_it_is_called_finished(src, tmp_path):
    dst = tmp_path / "dst"
    quantize_checkpoint(src, dst, RTN, progress=False)
    shard = sorted(dst.glob("*.safetensors"))[0]
    data = shard.read_bytes()

    def refused(text):
        with pytest.raises(CheckpointError, match=text):
            quantize_checkpoint(src, dst, RTN, resume=True, progress=False)

    shard.write_bytes(data[:-1])
    refused(rf"{shard.name}: has {len(data) - 1} bytes, report.json says {len(data)}.*delete")
    shard.unlink()
    refused(f"{shard.name}: missing")
    shard.write_bytes(data)
    index = dst / "model.safetensors.index.json"
    index.rename(tmp_path / "index")
    refused("index.json: missing")
    (tmp_path / "index").rename(index)
    tiny.edit_json(dst / "report.json", lambda report: report["files"].pop(shard.name))
    refused("report.json: its list of files is not that of SRC")


def test_resume_of_a_complete_or_new_folder(src, whole, tmp_path):
    dst = tmp_path / "dst"
    first = quantize_checkpoint(src, dst, RTN, resume=True, progress=False)
    again = quantize_checkpoint(src, dst, RTN, resume=True, progress=False)
    assert again == first
    assert tiny.digests(dst) == whole
    with pytest.raises(CheckpointError, match="not empty"):
        quantize_checkpoint(src, dst, RTN, progress=False)
    with pytest.raises(CheckpointError, match="not empty"):
        quantize_checkpoint(src, dst, BCQConfig(), resume=True, progress=False)


def test_two_processes_do_not_write_one_folder(src, half):
    with locked(half), pytest.raises(CheckpointError, match="another lutgemm process"):
        quantize_checkpoint(src, half, RTN, resume=True, progress=False)


class FullDisk:
    """A file that takes `room` bytes, then fails as a full disk does."""

    room = 0

    def __init__(self, handle):
        self.handle = handle

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.close()

    def __getattr__(self, name):
        return getattr(self.handle, name)

    def write(self, data):
        if len(data) > FullDisk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room -= len(data)
        return self.handle.write(data)


@pytest.mark.parametrize("room", [0, 3000, 20000, 60000])
def test_full_disk(room, src, whole, tmp_path, monkeypatch):
    """A full disk at any point: a clear message, nothing half-written under a final name, and it can go on."""
    dst = tmp_path / "dst"
    opened = type(dst).open
    with monkeypatch.context() as patch:
        FullDisk.room = room
        patch.setattr(
            type(dst),
            "open",
            lambda path, mode="r", **kw: (
                FullDisk(opened(path, mode, **kw)) if mode == "wb" else opened(path, mode, **kw)
            ),
        )
        with pytest.raises(CheckpointError, match=r"No space left on device; free some disk space.*--resume"):
            quantize_checkpoint(src, dst, RTN, progress=False)
    assert not [path for path in dst.rglob("*") if atomic.is_partial(path)]
    assert not (dst / "model.safetensors.index.json").exists()
    quantize_checkpoint(src, dst, RTN, resume=True, progress=False)
    assert tiny.digests(dst) == whole


LIMITED = """
import resource, signal, sys
from lutgemm.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(main(["quantize", *sys.argv[1:], "--method", "rtn", "-q"]))
"""


def test_file_size_limit_of_the_system(src, tmp_path):
    """A write that the kernel itself refuses."""
    command = [sys.executable, "-c", LIMITED, str(src), str(tmp_path / "dst")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [path for path in (tmp_path / "dst").rglob("*") if atomic.is_partial(path)]


def test_free_space_is_checked_before_anything_is_written(src, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000, "total": 10**9})
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs up to .* MB, but the disk has 0 MB free"):
        quantize_checkpoint(src, tmp_path / "dst", RTN, progress=False)
    assert not (tmp_path / "dst").exists()


def test_result_of_a_resumed_run_verifies(src, half):
    quantize_checkpoint(src, half, RTN, resume=True, progress=False)
    assert verify_checkpoint(half, src, progress=False)["ok"]
    assert json.loads((half / "report.json").read_text())["totals"]["layers"] == 7
