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
from stopped_conversions import RTN, result, source, stop_after, stopped_half_way

from lutgemm import BCQConfig, CheckpointError
from lutgemm.checkpoint import atomic, convert, quantize_checkpoint
from lutgemm.checkpoint.state import STATE_NAME, WORK_NAME
from lutgemm.checkpoint.verification import verify_checkpoint

src = pytest.fixture(scope="module")(source)
whole = pytest.fixture(scope="module")(result)
half = pytest.fixture(stopped_half_way)

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


def test_finished_layers_are_not_computed_again(src, whole, half, monkeypatch):
    done = stop_after(monkeypatch, 99)
    quantize_checkpoint(src, half, RTN, resume=True, progress=False)
    assert len(done) == 3
    assert tiny.digests(half) == whole


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
