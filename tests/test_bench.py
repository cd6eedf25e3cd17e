"""`lutgemm bench` and `lutgemm env`, the timer, and one benchmark of each op."""

import json
import re
import shlex
import sys
import time
from itertools import pairwise

import pytest
import torch

from lutgemm.backends import backends
from lutgemm.bench import baselines, machine, report, runner, shapes
from lutgemm.cli import main
from lutgemm.errors import ArgumentError
from lutgemm.ops import linear
from lutgemm.testing import hardware, timing
from lutgemm.testing.cases import CASES, OpCase
from lutgemm.testing.targets import Target, absent, targets

TINY = ["bench", "--shapes", "64x128", "--bits", "2", "--group-size", "64", "--m", "2", "--seconds", "0.02"]
FIELDS = """
op algorithm backend isa device threads mode M N K group_size dtype bits_per_weight median_us p10_us p90_us samples
bytes_moved gb_per_s read_gb_per_s bandwidth_percent speedup_fp32 speedup_bf16 baselines error correct message repro
"""


@pytest.fixture(autouse=True)
def small_memory(monkeypatch):
    """Few cold copies and a quick look at the memory: these tests are about behaviour, not figures."""
    monkeypatch.setattr(timing, "cold_copies", lambda nbytes, total=None: 3)
    for module in (runner, baselines):
        monkeypatch.setattr(module, "cold_copies", lambda nbytes, total=None: 3)
    monkeypatch.setattr(machine, "last_level_cache", lambda: 1 << 20)
    monkeypatch.setattr(machine, "MIN_BANDWIDTH_BYTES", 1 << 20)


def test_bench_prints_and_saves_complete_records(tmp_path, capsys):
    path = tmp_path / "run.json"
    assert main([*TINY, "--json", str(path), "--repro"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    saved = json.loads(path.read_text())
    header, records = saved["header"], saved["records"]
    for key in ("date", "command", "cpu", "cores", "caches", "python", "torch", "lutgemm", "commit", "dirty"):
        assert key in header
    here = [target for target in targets() if target.backend == records[0]["backend"]]
    offered = {name for target in here for op in CASES for name in target.algorithms(op)}
    assert {r["algorithm"] for r in records} == offered
    assert {r["mode"] for r in records} == {"cold", "hot"}
    for r in records:
        assert set(FIELDS.split()) <= r.keys()
        assert (r["M"], r["N"], r["K"], r["group_size"], r["dtype"]) == (2, 64, 128, 64, "float32")
        assert r["correct"]
        assert r["error"] < 1e-6
        assert 0 < r["p10_us"] <= r["median_us"] <= r["p90_us"]
        assert r["gb_per_s"] == pytest.approx(r["bytes_moved"] / r["median_us"] / 1e3)
        assert r["bandwidth_percent"] == pytest.approx(100 * r["gb_per_s"] / r["read_gb_per_s"])
        assert r["speedup_fp32"] == pytest.approx(r["baselines"]["torch_fp32"]["median_us"] / r["median_us"])
        assert r["speedup_bf16"] == pytest.approx(r["baselines"]["torch_bf16"]["median_us"] / r["median_us"])
        assert r["speedup_fp32_p10"] == pytest.approx(r["baselines"]["torch_fp32"]["p10_us"] / r["p10_us"])
    bcq = next(r for r in records if r["op"] == "bcq_linear")
    codes_scales_offsets = 64 * (2 * 128 // 8 + 3 * 2 * 2)
    assert bcq["bytes_moved"] == codes_scales_offsets + 4 * (2 * 128 + 2 * 64)
    assert bcq["bits_per_weight"] == 2 + 3 * 16 / 64
    out = capsys.readouterr().out
    assert "M=2 64x128 2-bit g64 fp32" in out
    assert "M=2 64x128 1x4x8 g64 fp32" in out
    assert out.count("torch_bf16") == 4
    assert all(r["repro"] in out for r in records)


def test_a_repro_command_measures_that_line_again(capsys):
    options = ["--op", "bcq_linear", "--scale-kind", "uniform", "--algorithms", "dequantize", "--hot", "--json", "-"]
    assert main([*TINY, *options]) == 0
    (first,) = json.loads(capsys.readouterr().out)["records"]
    command = shlex.split(first["repro"])
    assert command[0] == "lutgemm"
    assert main([*command[1:], "--seconds", "0.02", "--json", "-"]) == 0
    (again,) = json.loads(capsys.readouterr().out)["records"]
    measured = {"median_us", "p10_us", "p90_us", "samples", "gb_per_s", "read_gb_per_s", "bandwidth_percent"}
    measured |= {f"speedup_{name}" for name in ("fp32", "bf16", "fp32_p10", "bf16_p10")} | {"baselines"}
    for key in first.keys() - measured:
        assert again[key] == first[key], key


def test_nothing_wrong_is_timed(monkeypatch, capsys):
    """A kernel with one wrong element: the record says so, has no time, and the exit code is 1."""

    def off(x, weight, *args, algorithm, **choice):
        y = linear(x, weight, *args, algorithm=algorithm, **choice)
        if algorithm == "lut_gemm":
            y[1, 7] += 1
        return y

    monkeypatch.setattr(runner, "linear", off)
    assert main([*TINY, "--op", "bcq_linear", "--hot"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"lut_gemm .* -  .*WRONG", out)
    assert "WRONG lut_gemm M=2 64x128 2-bit g64 fp32: lut_gemm: 1 of 128 elements outside the bound" in out
    assert "worst at [1, 7]" in out
    assert re.search(r"dequantize .*yes", out)


def test_a_busy_machine_is_noted():
    header = machine.header()
    assert header["load"] is None or header["load"] >= 0
    noted = report.header_text({**header, "load": 3.0, "cores": 2}, [])
    assert "NOTE: 3.0 processes wanted the 2 cores before this run" in noted
    assert "NOTE" not in report.header_text({**header, "load": 0.4, "cores": 2}, [])
    assert "NOTE" not in report.header_text({**header, "load": None}, [])


def test_plot_is_a_png(tmp_path, capsys):
    path = tmp_path / "speed.png"
    assert main([*TINY, "--op", "codebook_linear", "--quick", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert "codegemm" in capsys.readouterr().out


def test_plot_without_matplotlib_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*TINY, "--op", "codebook_linear", "--hot", "--plot", str(tmp_path / "x.png")]) == 1
    captured = capsys.readouterr()
    assert "lutgemm: error: plot: " in captured.err
    assert "pip install 'lutgemm[bench]'" in captured.err
    assert "codegemm" in captured.out, "what was measured is printed before the plot fails"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4096"], "shapes: '4096' is not NxK (4096x4096) nor one of ['llama-3.1-8b', 'smollm2-135m']"),
        (["--shapes", "0x4"], "shapes: '0x4' is not NxK"),
        (["--bits", "9"], "bits=9 is not supported; use an integer from 1 to 8"),
        (["--bits", "two"], "bits='two' is not supported; use integers separated by commas"),
        (["--m", "0"], "m=0 is not supported"),
        (["--group-size", "48"], "group_size=48 is not supported for K=4096"),
        (["--group-size", "x"], "group-size=-1 is not supported"),
        (["--codebooks", "4x8"], "codebooks: '4x8' is not num_codebooks x vec_len x codebook_bits, such as 1x4x8"),
        (["--codebooks", "1x3x8"], "vec_len=3 is not supported"),
        (["--op", "gemm"], "op='gemm' is unknown; use some of ['bcq_linear', 'codebook_linear']"),
        (["--dtype", "fp8"], "dtype='fp8' is unknown; use some of fp32, fp16, bf16"),
        (["--backends", "tpu"], "backends: 'tpu' cannot run: no such backend for device cpu; use some of"),
        (["--algorithms", "fft"], "algorithms: 'fft' is not offered; use some of"),
        (["--isa", "sse9"], "isa: 'sse9' cannot run on this machine"),
        (["--baselines", "mkl"], "baselines: 'mkl' is unknown; use some of ['torch_fp32'"),
        (["--threads", "0"], "threads=0 is not supported"),
        (["--seconds", "-1"], "seconds=-1.0 is not supported"),
        (
            ["--json", "no/such/folder/x.json"],
            "json='no/such/folder/x.json': the folder 'no/such/folder' does not exist",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"lutgemm: error: {message}")
    assert captured.err.count("\n") == 1


def test_usage_errors_exit_2(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["bench", "--suite", "everything"])
    assert raised.value.code == 2
    assert "smoke" in capsys.readouterr().err


@pytest.mark.parametrize("name", shapes.SUITES)
def test_suites_are_valid_and_without_repeats(name):
    cases = shapes.SUITES[name]()
    assert cases
    assert len(set(cases)) == len(cases)
    for case in cases:
        assert case.layout.shape == (case.N, case.K)


def test_smoke_suite_on_the_reference_with_several_threads(capsys):
    options = [
        "--backends",
        "reference",
        "--algorithms",
        "dequantize",
        "--threads",
        "1,2",
        "--hot",
        "--seconds",
        "0.05",
        "--json",
        "-",
    ]
    assert main(["bench", "--suite", "smoke", *options]) == 0
    records = json.loads(capsys.readouterr().out)["records"]
    assert {(r["op"], r["threads"], r["backend"]) for r in records} == {
        (op, t, "reference") for op in CASES for t in (1, 2)
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys):
    assert main([*TINY, "--device", "cuda"]) == 1
    assert "device='cuda' cannot be used: this torch sees no CUDA device; use cpu" in capsys.readouterr().err


def test_a_wrong_time_cannot_be_written_over_an_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("old")
    monkeypatch.setattr(report, "dumps", lambda header, records: "new")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        report.write_json(path, {}, [])
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_timer_interleaves_and_rotates_the_copies():
    order = []
    calls = {
        "a": [lambda i=i: order.append(("a", i)) for i in range(3)],
        "b": [lambda: (order.append(("b", 0)), time.sleep(0.002))],
    }
    found = timing.time_interleaved(calls, seconds=0.2)
    assert found["b"].median_us > 1500
    assert found["a"].median_us < 500
    assert found["a"].p10_us <= found["a"].median_us <= found["a"].p90_us
    assert order[:4] == [("a", 0), ("a", 1), ("a", 2), ("b", 0)], "every copy is warmed up"
    names = [name for name, _ in order[4:]]
    visits = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    assert len(visits) >= 6, "several visits of each"
    indices = [i for name, i in order[4:] if name == "a"]
    assert all(later == (earlier + 1) % 3 for earlier, later in pairwise(indices))


def test_timer_takes_one_sample_of_what_is_slower_than_its_time():
    found = timing.time_interleaved({"slow": [lambda: time.sleep(0.02)], "fast": [lambda: None]}, seconds=0.001)
    assert found["slow"].samples >= 1
    assert found["fast"].samples >= 1
    with pytest.raises(ArgumentError, match="each needs at least one copy"):
        timing.time_interleaved({"none": []})


def test_timing_statistics():
    found = timing.Timing.of([i * 1e-6 for i in range(1, 102)])
    assert (found.median_us, found.p10_us, found.p90_us, found.samples) == pytest.approx((51, 11, 91, 101))
    with pytest.raises(ArgumentError, match="no samples"):
        timing.Timing.of([])


def test_threads_are_restored():
    before = torch.get_num_threads()

    def fail() -> None:
        with timing.torch_threads(before + 1) as count:
            assert count == torch.get_num_threads() == before + 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == before
    with timing.torch_threads(None) as count:
        assert count == before
    with pytest.raises(ArgumentError, match="threads=0"), timing.torch_threads(0):
        pass


def test_cold_copies_exceed_the_cache(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(timing, "last_level_cache", lambda: 1000)
    assert timing.cold_copies(100) == 41
    assert timing.cold_copies(10**6) == 2
    assert timing.cold_copies(64, total=640) == 11
    monkeypatch.setattr(timing, "last_level_cache", lambda: 10**9)
    assert timing.cold_copies(1 << 20) == 201


def test_hardware_answers():
    assert hardware.cpu_name()
    assert hardware.usable_cores() >= 1
    assert hardware.last_level_cache() >= 1 << 16
    assert hardware._bytes("512K") == 512 << 10
    assert hardware._bytes("36M") == 36 << 20
    assert machine.copy_bandwidth(1 << 20) > 0.1


def test_every_optional_baseline_runs():
    x = torch.randn(2, 128)
    for name, make in baselines.BASELINES.items():
        copies = make(x, 64, True)
        assert len(copies) == 3, name
        assert {call().shape for call in copies} == {(2, 64)}, name
    with pytest.raises(ArgumentError, match="torch_int4 takes K a multiple of 128"):
        baselines.BASELINES["torch_int4"](torch.randn(2, 100), 64, False)


def test_targets_cover_every_available_backend():
    assert {t.backend for t in targets()} | absent().keys() == set(backends())
    assert targets()[-1] == Target("reference")
    assert len(targets()) == len({t.name for t in targets()})


def test_env_lists_versions_and_reasons(capsys, monkeypatch):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert re.search(r"^  reference +available$", text, re.MULTILINE)
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["reference"] is None
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert set(found["compiled"]) == {"_C", "_host"}


def test_env_works_with_nothing_compiled(capsys, monkeypatch):
    from lutgemm import _native
    from lutgemm.backends import cpu

    monkeypatch.setattr(_native, "load_ops", lambda name="_C": "no compiler was found")
    monkeypatch.setattr(_native, "host", lambda: (None, "no compiler was found"))
    assert cpu.available_isas() == ()
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  cpu +NOT available: no compiler was found$", text, re.MULTILINE)
    assert re.search(r"^  _host +absent: no compiler was found$", text, re.MULTILINE)


@pytest.mark.parametrize("op", CASES)
def test_speed_of_one_call(benchmark, op):
    inputs = OpCase(op=op, M=1, N=256, K=256).inputs()
    with timing.torch_threads(1):
        y = benchmark.pedantic(linear, (inputs.x, inputs.weight), rounds=20, warmup_rounds=2)
    assert torch.isfinite(y).all()
