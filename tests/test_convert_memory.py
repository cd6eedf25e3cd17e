"""Conversion streams: its peak memory does not grow with the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny_checkpoints as tiny
import torch
import transformers
from safetensors.torch import save_file

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "options",
    [
        ["--include", "(up|down)_proj", "--method", "rtn"],
        ["--include", "up_proj", "--format", "codebook", "--iters", "1"],
    ],
    ids=["bcq", "codebook"],
)
def test_peak_memory_is_the_baseline_plus_twice_the_largest_tensor(options, tmp_path):
    """Baseline: torch, transformers and the meta model. `VmHWM`, because `ru_maxrss` starts with the parent's."""
    n, k, vocab = 7680, 2048, 4096
    src = tmp_path / "src"
    tiny.make(src, hidden_size=64)
    config = {"hidden_size": k, "intermediate_size": n, "vocab_size": vocab}
    tiny.edit_json(src / "config.json", lambda entry: entry.update(config))
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(src))
    state = {name: torch.empty(p.shape).normal_(generator=generator) for name, p in model.named_parameters()}
    save_file(state, src / "model.safetensors", metadata={"format": "pt"})
    largest = max(tensor.numel() * 4 for tensor in state.values())
    assert largest == n * k * 4
    assert sum(tensor.numel() * 4 for tensor in state.values()) > 3.5 * largest
    del state
    command = [sys.executable, "-c", PEAK, str(src), str(tmp_path / "dst"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    code, baseline, peak = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert peak - baseline <= 2 * largest, (
        f"{(peak - baseline) / 1e6:.0f} MB above a baseline of {baseline / 1e6:.0f} MB"
    )
