"""The figures asked of GPUs, looked up in made-up runs; and the counters of what misses them, by a made-up profiler."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from lutgemm.bench import counters, readme, report
from lutgemm.bench.baselines import BASELINES, SUITE_BASELINES
from lutgemm.bench.goals import H100_US, KINDS, PEERS, Goal, goals, kind_of, load, main, markdown, summary, text
from lutgemm.bench.records import Bandwidth, Record
from lutgemm.bench.shapes import BCQ, CODEBOOK, replace
from lutgemm.errors import BackendError
from lutgemm.testing.timing import Timing

H100 = {"gpu": {"name": "NVIDIA H100 80GB HBM3"}}


def record(us, kind="2-bit", shape=(8192, 8192), m=1, **changes):
    """A record of a made-up time, as JSON has it."""
    case = replace(CODEBOOK, num_codebooks=int(kind[9]), vec_len=int(kind[11])) if "x" in kind else BCQ
    case = case if "x" in kind else replace(BCQ, bits=int(kind[0]))
    case = replace(case, N=shape[0], K=shape[1], M=m, dtype="float16")
    t = Timing(us, us, us, 3)
    made = Record(
        case, "lut_gemm", "cuda", "", "cuda", 1, "cold", 2.4, 20_000_000, 0.0, True, "", t, Bandwidth(0, 3000)
    )
    return {**made.to_dict(), "auto": True, **changes}


def find(found, what):
    (goal,) = [goal for goal in found if goal.what == what]
    return goal


def run(*records):
    return {"header": H100, "records": list(records)}


def test_kinds_are_those_of_the_records():
    assert [kind_of(record(1.0, kind)) for kind in KINDS] == list(KINDS)
    assert kind_of(record(1.0, "4-bit", scale_kind="uniform")) == "4-bit uniform"


@pytest.mark.parametrize("shape", H100_US)
@pytest.mark.parametrize("kind", KINDS)
def test_each_time_is_asked_of_the_fastest_algorithm(shape, kind):
    asked = H100_US[shape][KINDS.index(kind)]
    slow, fast = record(asked + 1, kind, shape), record(asked - 0.5, kind, shape, algorithm="bit_planes")
    hot = record(0.1, kind, shape, mode="hot")
    what = f"{shape[0]}x{shape[1]} {kind}, 1 token"
    goal = find(goals([run(slow, fast, hot)]), what)
    assert (goal.asked, goal.found, goal.how, goal.verdict) == (asked, asked - 0.5, "bit_planes", "reached")
    assert find(goals([run(slow)]), what).verdict == "missed"
    assert find(goals([run(hot)]), what).verdict == "pending"


def test_what_an_h200_is_asked():
    found = goals([], "NVIDIA H200")
    assert find(found, "8192x8192 4-bit, 1 token").asked == 12
    assert find(found, "4096x4096 4-bit, 1 token").asked == 6


def test_only_what_is_asked_for_counts():
    other = [{"group_size": 64}, {"accuracy": "exact"}, {"dtype": "float32"}, {"device": "cpu"}, {"median_us": None}]
    other += [{"backend": "triton"}, {"scale_kind": "uniform"}]
    found = goals([run(*(record(1.0, **change) for change in other))])
    assert find(found, "8192x8192 2-bit, 1 token").found is None


def test_bandwidth_of_large_layers():
    what = "of the copy bandwidth, 8192x8192 and larger, 2 bits and more"
    good, bad = record(8.0), record(16.0, "4-bit")
    assert find(goals([run(good)]), what).found == pytest.approx(100 * 20_000_000 / 8.0 / 1e3 / 3000)
    least = find(goals([run(good, bad, record(99.0, "1-bit"), record(99.0, "4-bit", (4096, 4096)))]), what)
    assert least.found == pytest.approx(41.7, abs=0.1)
    assert least.how == "8192x8192 4-bit M=1 lut_gemm"
    assert least.verdict == "missed"


def test_few_tokens_cost_little_more_than_one():
    what = "8192x8192, 2 to 8 tokens over 1"
    records = [record(10.0), record(11.0, m=2), record(12.0, m=8, algorithm="biqgemm"), record(90.0, m=16)]
    goal = find(goals([run(*records)]), what)
    assert (goal.found, goal.verdict, goal.how) == (1.2, "reached", "8192x8192 2-bit M=8 biqgemm")
    assert find(goals([run(*records[1:])]), what).found is None


def test_named_algorithms_beat_the_textbook_of_as_many_bits():
    two = record(10.0, speedup={"textbook_2bit": 1.5, "textbook_1bit": 0.2})
    three = record(10.0, "3-bit", speedup={"textbook_3bit": 0.9})
    book = record(10.0, "codebook 1x4x8", algorithm="codegemm", speedup={"textbook_2bit": 2.0})
    found = goals([run(two, three, book)])
    worst = find(found, "lut_gemm over the textbook LUT-GEMM, 1 token")
    assert (worst.found, worst.verdict) == (0.9, "missed")
    assert find(found, "codegemm over the textbook LUT-GEMM, 1 token").found == 2.0
    assert find(found, "biqgemm over the textbook LUT-GEMM, 1 token").found is None


def test_auto_is_compared_with_cublas():
    slow = record(10.0, m=32, speedup={"torch_fp16": 0.8})
    chosen = record(9.0, m=32, algorithm="dequant_gemm", speedup={"torch_fp16": 1.1})
    many = record(99.0, m=1024, algorithm="dequantize", speedup={"torch_fp16": 0.9})
    found = goals([run({**slow, "auto": False}, chosen, many)])
    assert find(found, "auto over cuBLAS fp16, 32 tokens").found == 1.1
    assert find(found, "auto over cuBLAS fp16, 1024 tokens").verdict == "reached"
    assert find(goals([run(slow)]), "auto over cuBLAS fp16, 32 tokens").verdict == "missed"


def test_peers_are_compared_at_as_many_bits_or_more():
    speedup = {"gemlite_1bit": 0.5, "gemlite_2bit": 1.2, "gemlite_4bit": 1.4, "torch_int4": 0.9}
    found = goals([run(record(10.0, speedup=speedup), record(10.0, "4-bit", speedup={"gemlite_4bit": 0.1}))])
    assert find(found, "auto over gemlite, up to 16 tokens and 3 bits").found == 1.2
    assert find(found, "auto over tinygemm, up to 16 tokens and 3 bits").verdict == "missed"
    assert find(found, "auto over humming, up to 16 tokens and 3 bits").verdict == "pending"


def test_every_peer_is_in_the_suites():
    """Of each package that the goals name, every baseline; and those of torch and of the paper."""
    named = {name for baselines in PEERS.values() for name in baselines}
    named |= {"torch_fp16", "torch_bf16", *(f"textbook_{bits}bit" for bits in (1, 2, 3, 4))}
    assert named <= BASELINES.keys()
    assert set(SUITE_BASELINES["gpu"]) == set(SUITE_BASELINES["gpu-all"]) == named


def test_a_block_is_asked_for_as_a_whole():
    def block(us, weights, model="llama-3.1-8b"):
        return {"model": model, "weights": weights, "dtype": "float16", "timing": {"median_us": us}}

    what = "Llama 3.1 8B block at 2 bits, 1 token"
    blocks = [block(55.0, "bcq 2-bit"), block(70.0, "codebook 1x4x8"), block(20.0, "bcq 3-bit")]
    blocks += [block(1.0, "bcq 2-bit", "smollm2-135m"), {**block(1.0, "bcq 2-bit"), "timing": None}]
    goal = find(goals([{"header": H100, "block": blocks}]), what)
    assert (goal.found, goal.how, goal.verdict) == (55.0, "bcq 2-bit float16", "reached")
    assert find(goals([{"header": {"gpu": None}, "block": blocks}]), what).found is None


def test_triton_is_compared_with_cuda_and_gemlite():
    cuda = [record(10.0), record(10.0, shape=(4096, 4096))]
    triton = [
        record(12.0, backend="triton", speedup={"gemlite_2bit": 1.1}),
        record(99.0, shape=(4096, 4096), backend="triton", speedup={"gemlite_2bit": 1.2}),
        record(99.0, m=256, backend="triton", speedup={"torch_fp16": 0.8}),
    ]
    found = goals([run(*cuda), run(*triton)])
    assert find(found, "triton over cuda, up to 8 tokens, 8192x8192 and larger").found == 1.2
    assert find(found, "triton over gemlite of as many bits, up to 8 tokens").found == 1.1
    assert find(found, "triton over cuBLAS fp16, 256 tokens and more").verdict == "missed"


def test_goals_as_text_and_as_a_table():
    found = [Goal("a", 9, "us", 8.25, how="lut_gemm"), Goal("b", 1, "x", 0.5, at_most=False), Goal("c", 80, "%", None)]
    lines = text(found).splitlines()
    assert lines[0].split("  ") == ["reached", "a", "8.2 us", "<= 9 us", "lut_gemm"]
    assert lines[1].startswith("missed   b  0.50 x  >= 1 x")
    assert summary(found) == lines[-1] == "figures asked for: 1 reached, 1 missed, 1 pending"
    table = markdown(found)
    assert "| b | >= 1 x | **0.50 x** |" in table
    assert "| c | <= 80 % | pending |" in table


def test_the_report_of_a_gpu_ends_with_its_goals():
    t = Timing(8.0, 8.0, 8.0, 3)
    case = replace(BCQ, N=8192, K=8192, bits=2, dtype="float16")
    own = Record(case, "lut_gemm", "cuda", "", "cuda", 1, "cold", 2.4, 20_000_000, 0.0, True, "", t, Bandwidth(0, 3000))
    assert "reached  8192x8192 2-bit, 1 token" in report.table([own])
    assert "missed   8192x8192 2-bit, 1 token" in report.table([own], {"gpu": {"name": "NVIDIA H200"}})
    assert "asked for" not in report.table([replace(own, device="cpu", backend="cpu")])


def test_goals_of_files(tmp_path, capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "pending  8192x8192 2-bit, 1 token" in out
    assert "0 reached, 0 missed" in out
    file = tmp_path / "gpu.json"
    assert main([str(file)]) == 1
    assert "nothing was measured" in capsys.readouterr().out
    file.write_text(json.dumps(run(record(8.0))))
    assert load([file, tmp_path / "absent.json"]) == [json.loads(file.read_text())]
    assert main([str(file), str(tmp_path / "absent.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("NVIDIA H100 80GB HBM3\n")
    assert "reached  8192x8192 2-bit, 1 token" in out


def test_a_page_can_state_them(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps(run(record(8.0))))
    (tmp_path / "gpu-triton.json").write_text(json.dumps(run(record(8.0, backend="triton"))))
    page = readme.update("<!-- table: gpu goals -->\nold\n<!-- end -->\n", tmp_path)
    assert "old" not in page
    assert "| 8192x8192 2-bit, 1 token | <= 9 us | 8.0 us | lut_gemm |" in page
    assert "pending on NVIDIA H100 80GB HBM3\n<!-- end -->" in page
    assert "| triton over cuda, up to 8 tokens, 8192x8192 and larger | <= 1.3 x | 1.00 x |" in page
    without = readme.update("<!-- table: none goals -->\n<!-- end -->\n", tmp_path)
    assert "0 reached, 0 missed" in without


NCU = """==PROF== Connected
"ID","Process ID","Kernel Name","launch__grid_size","dram__bytes_read.sum","gpu__time_duration.sum"
"","","","","byte","ns"
"0","7","lut_gemm_kernel(Args)","132","21,000,000","9,100"
"1","7","reduce_splits(Args)","8","1000","n/a"
"""


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """A profiler that says what the test wants; it keeps its arguments in a file."""

    def made(text, status=0):
        (tmp_path / "said").write_text(text)
        command = tmp_path / "ncu"
        known = "gpu__time_duration x\\ndram__bytes_read y\\n"
        command.write_text(
            f'#!/bin/sh\n[ "$1" = --query-metrics ] && {{ printf "{known}"; exit 0; }}\n'
            f'printf "%s\\n" "$@" > {shlex.quote(str(tmp_path))}/arguments\ncat {shlex.quote(str(tmp_path))}/said\n'
            f"exit {status}\n"
        )
        command.chmod(0o755)
        monkeypatch.setattr(counters, "find_ncu", lambda: str(command))
        return tmp_path / "arguments"

    return made


def test_what_misses_its_figure_is_profiled(ncu, tmp_path, capsys):
    arguments = ncu(NCU)
    (tmp_path / "gpu.json").write_text(json.dumps(run(record(99.0), record(1.0, "4-bit"))))
    assert counters.main([str(tmp_path / "p.json"), str(tmp_path / "gpu.json")]) == 0
    (found,) = json.loads((tmp_path / "p.json").read_text())["profiles"]
    assert (found["what"], found["asked_us"]) == ("8192x8192 2-bit, 1 token", 9)
    assert [kernel["kernel"] for kernel in found["kernels"]] == ["lut_gemm_kernel(Args)", "reduce_splits(Args)"]
    assert found["kernels"][0]["bytes from memory"] == 21e6
    assert found["kernels"][1]["us"] is None
    given = arguments.read_text().splitlines()
    asked = given[given.index("--metrics") + 1].split(",")
    assert {"gpu__time_duration.sum", "dram__bytes_read.sum", "launch__grid_size"} <= set(asked)
    assert "sm__warps_active.avg.pct_of_peak_sustained_active" not in asked, "this profiler does not know it"
    assert json.loads(given[given.index("--call") + 1])["median_us"] == 99.0
    assert "bytes from memory 2.1e+07" in capsys.readouterr().out


def test_counters_that_are_not_to_be_had_are_said(ncu, tmp_path, capsys):
    ncu("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n", status=1)
    (tmp_path / "gpu.json").write_text(json.dumps(run(record(99.0))))
    assert counters.main([str(tmp_path / "p.json"), str(tmp_path / "gpu.json")]) == 0
    assert "ncu counted nothing: ==ERROR== ERR_NVGPUCTRPERM" in capsys.readouterr().out
    assert not (tmp_path / "p.json").exists()
    with pytest.raises(BackendError, match="ncu counted nothing"):
        counters.profile(record(1.0), counters.find_ncu(), ["x"])


def test_without_a_profiler_or_a_miss_there_is_nothing_to_profile(tmp_path, monkeypatch, capsys):
    (tmp_path / "gpu.json").write_text(json.dumps(run(record(1.0))))
    arguments = [str(tmp_path / "p.json"), str(tmp_path / "gpu.json")]
    monkeypatch.setattr(counters, "find_ncu", lambda: None)
    assert counters.main(arguments) == 0
    assert "no counters" in capsys.readouterr().out
    monkeypatch.setattr(counters, "find_ncu", lambda: sys.executable)
    assert counters.main(arguments) == 0
    assert "nothing to profile" in capsys.readouterr().out
    assert counters.main([]) == 1
    assert not Path(tmp_path, "p.json").exists()
