"""Conversion streams: its peak memory stays below twice the largest tensor, rows are read when they are due."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny_checkpoints as tiny
import torch
import transformers
from safetensors.torch import save_file

from lutgemm import CheckpointError
from lutgemm.checkpoint.records import StoredWeight
from lutgemm.checkpoint.safetensors_file import SafetensorsFile

LARGEST = 32 << 20

PEAK = """
import json, sys
from pathlib import Path
from lutgemm.checkpoint.discover import discover
from lutgemm.checkpoint.reader import open_source
from lutgemm.cli import main

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

source = open_source(sys.argv[1])
discover(source.config, source.shapes)
baseline = peak()
code = main(["quantize", *sys.argv[1:], "-q"])
print(json.dumps([code, baseline, peak()]))
"""


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    """(folder, bytes of its largest tensor: 32 MiB, the weight of each of the three layers of the MLP)."""
    dtype = getattr(torch, request.param)
    n, k = 8192, LARGEST // dtype.itemsize // 8192
    src = tmp_path_factory.mktemp(request.param) / "src"
    tiny.make(src, hidden_size=64)
    config = {"hidden_size": k, "intermediate_size": n, "vocab_size": 2048, "dtype": request.param}
    tiny.edit_json(src / "config.json", lambda entry: entry.update(config))
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(src))
    state = {name: torch.empty(p.shape).normal_(generator=generator).to(dtype) for name, p in model.named_parameters()}
    sizes = [tensor.nbytes for tensor in state.values()]
    save_file(state, src / "model.safetensors", metadata={"format": "pt"})
    assert max(sizes) == LARGEST
    assert sum(sizes) > 3.4 * LARGEST
    return src


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ("float32", ["--method", "rtn"]),
        ("float32", ["--method", "best"]),
        ("float32", ["--method", "best", "--scale-kind", "free", "--bits", "2"]),
        ("float32", ["--format", "codebook"]),
        ("bfloat16", ["--method", "rtn"]),
        ("bfloat16", ["--method", "best"]),
        ("bfloat16", ["--format", "codebook"]),
    ],
    indirect=["checkpoint"],
)
def test_peak_memory_is_the_baseline_plus_twice_the_largest_tensor(options, checkpoint, tmp_path):
    """Baseline: torch and transformers imported, the configuration and the headers of the shards read, the model built
    on the meta device; no weight read, no operator run yet. So the pages of torch's code that the quantizer is the
    first to use (about 11 MiB) are on the converter's side. `VmHWM`, because `ru_maxrss` starts with the parent's."""
    command = [sys.executable, "-c", PEAK, str(checkpoint), str(tmp_path / "dst"), "--include", "up_proj", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    code, baseline, peak = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert peak - baseline <= 2 * LARGEST, (
        f"{(peak - baseline) / 2**20:.0f} MiB above a baseline of {baseline / 2**20:.0f} MiB"
    )


def test_rows_of_a_file_are_the_rows_of_its_tensor(tmp_path):
    values = torch.arange(40 * 7, dtype=torch.bfloat16).view(40, 7)
    save_file({"other": torch.ones(3), "weight": values}, tmp_path / "file.safetensors")
    rows = StoredWeight(SafetensorsFile(tmp_path / "file.safetensors"), "weight")
    assert rows.shape == (40, 7)
    assert rows.dtype == torch.bfloat16
    for index in (slice(0, 40), slice(3, 9), slice(39, 60), slice(5, 5)):
        assert torch.equal(rows[index], values[index])
    for numbers in ([0], [39, 0, 39], [5, 5, 6], []):
        assert torch.equal(rows[torch.tensor(numbers, dtype=torch.int64)], values[numbers])
    (tmp_path / "file.safetensors").write_bytes((tmp_path / "file.safetensors").read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="ends early"):
        rows[torch.tensor([0, 39])]
