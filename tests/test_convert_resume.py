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

from lutgemm import BCQConfig, CheckpointError
from lutgemm.checkpoint import atomic, convert, quantize_checkpoint
from lutgemm.checkpoint.state import STATE_NAME, WORK_NAME, locked
from lutgemm.checkpoint.verification import verify_checkpoint

RTN = BCQConfig(bits=3, group_size=32, method="rtn")


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
