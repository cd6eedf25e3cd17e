"""What measures GPUs, as far as it can be tested without one; and the suite of whole blocks, which runs anywhere."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lutgemm.bench import block, runner, textbook
from lutgemm.bench.records import Bandwidth, rates
from lutgemm.bench.shapes import ALL_TOKENS, GPU_KINDS, GPU_SHAPES, MAIN_GPU_SHAPES, SUITES
from lutgemm.cli import main
from lutgemm.errors import BackendError
from lutgemm.testing import timing
from lutgemm.testing.cases import OpCase
from lutgemm.testing.timing import Timing

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
SMALL = ((96, 64), (64, 128))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(block, "BLOCKS", {"small": SMALL})
    monkeypatch.setattr("lutgemm.cli.bench.BLOCKS", ("small",))
    monkeypatch.setattr(block, "cold_copies", lambda nbytes, total=None: 2)


def test_a_block_is_measured_beside_torch(small_blocks, tmp_path, capsys):
    file = tmp_path / "block.json"
    assert main(["bench", "--suite", "block", "--seconds", "0.05", "--dtype", "fp32,bf16", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    records = json.loads(file.read_text())["block"]
    assert [(r["dtype"], r["weights"]) for r in records] == [
        (dtype, name) for dtype in ("float32", "bfloat16") for name in ("torch", *block.WEIGHTS)
    ]
    assert all(r["correct"] and r["timing"]["median_us"] > 0 and r["speedup"] > 0 for r in records)
    assert records[0]["nbytes"] == sum(4 * n * k for n, k in SMALL)
    assert records[0]["speedup"] == 1
    assert records[1]["nbytes"] < records[0]["nbytes"] / 8 < records[-1]["nbytes"] * 8
    assert "codebook 2x8x8" in out
    assert "WRONG" not in out


def test_a_wrong_block_is_not_timed(small_blocks, monkeypatch, capsys):
    right = block.linear
    monkeypatch.setattr(block, "linear", lambda x, w: right(x, w) * (1.01 if hasattr(w, "bits") else 1))
    assert main(["bench", "--suite", "block", "--seconds", "0.01", "--json", "-"]) == 1
    records = json.loads(capsys.readouterr().out)["block"]
    wrong = {r["weights"] for r in records if not r["correct"]}
    assert wrong == {name for name in block.WEIGHTS if name.startswith("bcq")}
    assert all(r["timing"] is None and r["speedup"] is None for r in records if not r["correct"])


def test_a_block_that_raises_is_reported_and_ends_nothing(small_blocks, monkeypatch, capsys):
    right = block.linear

    def broken(x, w):
        if getattr(w, "bits", 0) == 3:
            raise RuntimeError("no such kernel image")
        return right(x, w)

    monkeypatch.setattr(block, "linear", broken)
    assert main(["bench", "--suite", "block", "--seconds", "0.01"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (wrong,) = [line for line in lines if "WRONG" in line]
    assert wrong.endswith("WRONG bcq 3-bit failed: RuntimeError: no such kernel image")
    assert sum(" yes" in line for line in lines) == len(block.WEIGHTS)


def test_a_block_is_not_drawn(tmp_path, capsys):
    assert main(["bench", "--suite", "block", "--plot", str(tmp_path / "x.png")]) == 1
    assert "leave --plot out" in capsys.readouterr().err


def test_the_gpu_suite_has_every_shape_and_format():
    cases = SUITES["gpu"]()
    assert {(c.N, c.K) for c in cases} == set(GPU_SHAPES)
    assert {c.bits for c in cases if c.op == "bcq_linear"} == {1, 2, 3, 4}
    assert {(c.num_codebooks, c.vec_len) for c in cases if c.op == "codebook_linear"} == {(1, 4), (2, 8)}
    assert {c.M for c in cases} == {1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096}
    assert all(c.dtype == "float16" and c.layout and c.group_size == 128 for c in cases)
    assert len(set(cases)) == len(cases)
    everything = SUITES["gpu-all"]()
    assert set(cases) < set(everything)
    assert len(set(everything)) == len(GPU_SHAPES) * len(ALL_TOKENS) * len(GPU_KINDS)
    assert (
        *((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)),
        *((8192, 8192), (57344, 8192), (8192, 28672)),
    ) == GPU_SHAPES


def test_on_a_gpu_what_is_wanted_most_comes_first():
    cases = SUITES["gpu"]()
    groups = runner.grouped(cases, urgent_first=True)
    order = [(group[0].N, group[0].K, group[0].M) for group in groups]
    assert order[:3] == [(n, k, 1) for n, k in MAIN_GPU_SHAPES]
    assert all(m <= 16 and (n, k) in MAIN_GPU_SHAPES for n, k, m in order[:15])
    assert {m for _, _, m in order[15:21]} == {32, 1024}
    others = [place for place, (n, k, m) in enumerate(order) if m == 1 and (n, k) not in MAIN_GPU_SHAPES]
    assert others == list(range(21, 25))
    assert {case for group in groups for case in group} == set(cases)
    assert all(len(group) == len(GPU_KINDS) for group in groups)
    plain = runner.grouped(cases)
    assert sorted(map(len, plain)) == sorted(map(len, groups))
    assert [(g[0].N, g[0].K) for g in plain[:10]] == [GPU_SHAPES[0]] * 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize("suite", ["gpu", "gpu-all"])
def test_the_gpu_suites_ask_for_a_gpu(suite, capsys):
    assert main(["bench", "--suite", suite]) == 1
    assert "this torch sees no CUDA device" in capsys.readouterr().err


def test_cold_copies_of_a_gpu_exceed_its_cache(monkeypatch):
    monkeypatch.setattr(timing, "gpu_cache", lambda device: 50 << 20)
    assert timing.cold_bytes("cuda") == 256 << 20
    monkeypatch.setattr(timing, "gpu_cache", lambda device: 100 << 20)
    assert timing.cold_bytes("cuda:1") == 400 << 20


def test_without_a_read_bandwidth_rates_are_of_the_copy_bandwidth():
    found = rates(Timing(10.0, 9.0, 11.0, 5), 10_000_000, Bandwidth(0.0, 4000.0))
    assert found["gb_per_s"] == 1000
    assert found["bandwidth_percent"] == 25
    assert rates(Timing(10.0, 9.0, 11.0, 5), 10_000_000, Bandwidth(2000.0, 4000.0))["bandwidth_percent"] == 50


def test_textbook_layout_gives_the_weight():
    """What the kernel computes from its layout, written out: y of the identity is the dequantized weight."""
    weight = OpCase(N=6, K=96, bits=3, group_size=32).weight("exact")
    codes, scales, offsets = textbook.textbook_layout(weight)
    words, bits, n = codes.shape
    assert (words, bits, n) == (3, 3, 6)
    dense = torch.zeros(n, 96)
    for w in range(words):
        group = w * textbook.TILE // 32
        for i in range(32):
            signs = ((codes[w] >> i) & 1).float() * 2 - 1
            dense[:, 32 * w + i] = (scales[group].float() * signs).sum(0) + offsets[group].float()
    assert torch.equal(dense, weight.dequantize())


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_gpu_programs_compile(tmp_path):
    library = textbook.build("sm_80", tmp_path)
    assert library.is_file()
    assert textbook.build("sm_80", tmp_path) == library
    assert len(list(tmp_path.iterdir())) == 1
    source = Path(textbook.SOURCE).with_name("primitives.cu")
    command = [NVCC, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Werror=all-warnings", "-o"]
    ran = subprocess.run([*command, str(tmp_path / "primitives"), str(source)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_a_failing_compiler_is_reported(tmp_path):
    with pytest.raises(BackendError, match="nvcc failed"):
        textbook.build("sm_1", tmp_path / "new")
