"""`lutgemm bench` and `lutgemm env`: what they measure, refuse and save; and one benchmark of each op."""

import json
import re
import shlex
from itertools import pairwise

import pytest
import torch
from bench_runs import TINY, few_copies

from lutgemm import _native
from lutgemm.accuracy import ACCURACIES
from lutgemm.backends import backends
from lutgemm.bench import overhead, runner, shapes
from lutgemm.cli import main
from lutgemm.errors import ArgumentError, BackendError
from lutgemm.ops import linear
from lutgemm.testing import timing
from lutgemm.testing.cases import CASES, OpCase
from lutgemm.testing.targets import Target, absent, targets

small_memory = pytest.fixture(autouse=True)(few_copies)

FIELDS = """
op algorithm auto accuracy backend isa device threads mode M N K group_size dtype outliers bits_per_weight median_us
p10_us p90_us samples bytes_moved gb_per_s read_gb_per_s copy_gb_per_s bandwidth_percent speedup speedup_p10 error
correct message repro
"""
BASELINE_FIELDS = """
name device threads mode M N K bits_per_weight median_us p10_us p90_us samples bytes_moved gb_per_s read_gb_per_s
copy_gb_per_s bandwidth_percent error bound correct message
"""


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
    assert {b["name"] for b in saved["baselines"]} == {"torch_fp32", "torch_bf16"}
    assert len(saved["baselines"]) == 4, "one of each name and mode: all cases share them"
    for b in saved["baselines"]:
        assert set(BASELINE_FIELDS.split()) <= b.keys()
        assert (b["M"], b["N"], b["K"], b["correct"], b["message"]) == (2, 64, 128, True, None)
        assert 0 < b["error"] <= b["bound"]
    for r in records:
        assert set(FIELDS.split()) <= r.keys()
        assert (r["M"], r["N"], r["K"], r["group_size"], r["dtype"]) == (2, 64, 128, 64, "float32")
        assert r["correct"]
        assert r["accuracy"] == "accurate"
        assert r["error"] < 1e-3
        assert 0 < r["p10_us"] <= r["median_us"] <= r["p90_us"]
        assert r["gb_per_s"] == pytest.approx(r["bytes_moved"] / r["median_us"] / 1e3)
        assert r["bandwidth_percent"] == pytest.approx(100 * r["gb_per_s"] / r["read_gb_per_s"])
        assert r["copy_gb_per_s"] > 0
        beside = {b["name"]: b for b in saved["baselines"] if b["mode"] == r["mode"]}
        for name in ("torch_fp32", "torch_bf16"):
            assert r["speedup"][name] == pytest.approx(beside[name]["median_us"] / r["median_us"])
            assert r["speedup_p10"][name] == pytest.approx(beside[name]["p10_us"] / r["p10_us"])
    bcq = next(r for r in records if r["op"] == "bcq_linear")
    codes_scales_offsets = 64 * (2 * 128 // 8 + 3 * 2 * 2)
    assert bcq["bytes_moved"] == codes_scales_offsets + 4 * (2 * 128 + 2 * 64)
    assert bcq["bits_per_weight"] == 2 + 3 * 16 / 64
    out = capsys.readouterr().out
    assert "M=2 64x128 2-bit g64 fp32" in out
    assert "M=2 64x128 1x4x8 g64 fp32" in out
    assert out.count("torch_bf16") == 2
    assert "memory is read at" in out
    assert all(r["repro"] in out for r in records)


def test_a_repro_command_measures_that_line_again(capsys):
    options = ["--op", "bcq_linear", "--scale-kind", "uniform", "--algorithms", "dequantize", "--hot", "--json", "-"]
    options += ["--outliers", "--accuracy", "near-exact"]
    assert main([*TINY, *options]) == 0
    (first,) = json.loads(capsys.readouterr().out)["records"]
    command = shlex.split(first["repro"])
    assert command[0] == "lutgemm"
    assert main([*command[1:], "--seconds", "0.02", "--json", "-"]) == 0
    (again,) = json.loads(capsys.readouterr().out)["records"]
    measured = {"median_us", "p10_us", "p90_us", "samples", "gb_per_s", "read_gb_per_s", "copy_gb_per_s"}
    measured |= {"bandwidth_percent", "speedup", "speedup_p10"}
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
    assert main([*TINY, "--op", "bcq_linear", "--hot", "--accuracy", "exact"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"lut_gemm .* -  .*WRONG", out)
    assert "WRONG lut_gemm M=2 64x128 2-bit g64 fp32: lut_gemm: 1 of 128 elements outside the bound" in out
    assert "worst at [1, 7]" in out
    assert re.search(r"dequantize .*yes", out)


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
        (["--accuracy", "sloppy"], "accuracy='sloppy' is unknown; use one of"),
        (["--suite", "overhead", "--plot", "x.png"], "plot='x.png': there is no drawing of --suite overhead"),
        (["--dtype", "fp8"], "dtype='fp8' is unknown; use some of fp32, fp16, bf16"),
        (["--backends", "tpu"], "backends: 'tpu' cannot run: no such backend for device cpu; use some of"),
        (["--algorithms", "fft"], "algorithms: 'fft' is not offered; use some of"),
        (["--isa", "sse9"], "isa: 'sse9' cannot run on this machine"),
        (["--baselines", "mkl"], "baselines: 'mkl' is unknown; use all, or some of ['torch_fp32'"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "everything"], "smoke"),
        (["--op", ","], "argument --op: ',' has no names; separate them by commas"),
        (["--op", ""], "argument --op: got no names"),
        (["--dtype", ",,"], "argument --dtype: ',,' has no names"),
        (["--algorithms", ","], "argument --algorithms: ',' has no names"),
        (["--accuracy", ","], "argument --accuracy: ',' has no names"),
        (["--baselines", ","], "argument --baselines: ',' has no names"),
    ],
)
def test_usage_errors_exit_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["bench", *arguments])
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


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


def test_a_kernel_that_raises_is_reported_and_ends_nothing(monkeypatch, capsys):
    def broken(x, weight, *args, algorithm, **choice):
        if algorithm == "lut_gemm":
            raise RuntimeError("an illegal memory access\nand what to do")
        return linear(x, weight, *args, algorithm=algorithm, **choice)

    monkeypatch.setattr(runner, "linear", broken)
    assert main([*TINY, "--op", "bcq_linear", "--hot", "--json", "-"]) == 1
    records = {r["algorithm"]: r for r in json.loads(capsys.readouterr().out)["records"]}
    assert records["lut_gemm"]["message"] == "lut_gemm failed: RuntimeError: an illegal memory access"
    assert (records["lut_gemm"]["error"], records["lut_gemm"]["median_us"]) == (None, None)
    assert records["dequantize"]["correct"]
    assert main([*TINY, "--op", "bcq_linear", "--hot"]) == 1
    assert re.search(r"lut_gemm .* - +WRONG", capsys.readouterr().out)


def test_what_cannot_be_timed_does_not_keep_the_others_from_it(monkeypatch, capsys):
    """As a call that cannot be captured in a graph, or that has no memory for so many copies."""
    clock = timing.time_interleaved

    def picky(calls, seconds):
        if any(getattr(name, "algorithm", name) in ("lut_gemm", "torch_bf16") for name in calls):
            raise RuntimeError("operation not permitted when stream is capturing")
        return clock(calls, seconds)

    monkeypatch.setattr(runner, "time_interleaved", picky)
    assert main([*TINY, "--op", "bcq_linear", "--hot", "--json", "-"]) == 1
    saved = json.loads(capsys.readouterr().out)
    records = {r["algorithm"]: r for r in saved["records"]}
    assert records["lut_gemm"]["message"].endswith("operation not permitted when stream is capturing")
    assert not records["lut_gemm"]["correct"]
    assert records["dequantize"]["median_us"] > 0
    assert {b["name"]: b["median_us"] is None for b in saved["baselines"]} == {"torch_fp32": False, "torch_bf16": True}

    def broken(calls, seconds):
        raise RuntimeError("no clock")

    monkeypatch.setattr(runner, "time_interleaved", broken)
    assert main([*TINY, "--op", "bcq_linear", "--hot", "--json", "-"]) == 1
    assert all("no clock" in r["message"] for r in json.loads(capsys.readouterr().out)["records"])


def test_one_algorithm_of_a_backend_is_what_auto_takes(capsys):
    assert main([*TINY, "--hot", "--json", "-"]) == 0
    records = json.loads(capsys.readouterr().out)["records"]
    for op in CASES:
        assert [r["auto"] for r in records if r["op"] == op].count(True) == 1


def test_cases_of_one_x_are_timed_together():
    cases = shapes.SUITES["cpu"]()
    groups = runner.grouped(cases)
    assert sorted(map(len, groups)) == sorted([17, 4, 4, 1, *[3] * 10])
    assert [case for group in groups for case in group] != cases
    assert {case for group in groups for case in group} == set(cases)
    shapes_in_order = [(g[0].N, g[0].K) for g in groups]
    changes = sum(a != b for a, b in pairwise(shapes_in_order))
    assert changes == len(set(shapes_in_order)) - 1
    small = [group for group in groups if group[0].N < 1024]
    assert len(small) == 2
    for group in small:
        first = group[0].inputs().x
        assert all(torch.equal(case.inputs().x, first) for case in group)


def test_every_accuracy_is_measured_and_checked(capsys):
    options = ["--op", "bcq_linear", "--algorithms", "lut_gemm", "--hot", "--accuracy", ",".join(ACCURACIES)]
    assert main([*TINY, *options, "--json", "-"]) == 0
    records = json.loads(capsys.readouterr().out)["records"]
    assert [r["accuracy"] for r in records] == list(ACCURACIES)
    errors = {r["accuracy"]: r["error"] for r in records}
    assert errors["exact"] < 1e-6
    assert errors["near-exact"] < 1e-4
    assert errors["accurate"] < 1e-3
    assert errors["fast"] < 2e-2


def test_an_error_above_its_accuracy_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(runner, "linear", lambda *a, **choice: linear(*a, **choice) * 1.01)
    assert main([*TINY, "--op", "bcq_linear", "--algorithms", "lut_gemm", "--hot", "--accuracy", "accurate,fast"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"accurate .*WRONG", out)
    assert re.search(r"fast .*yes", out)
    assert "root mean square error" in out


def test_quick_keeps_the_seconds_that_are_given(monkeypatch):
    seen = []

    def note(cases, options):
        seen.append(options)
        raise ArgumentError("seen")

    monkeypatch.setattr("lutgemm.cli.bench.run_all", note)
    for arguments in (["--quick"], ["--quick", "--seconds", "3"], [], ["--suite", "cpu"]):
        assert main(["bench", *arguments]) == 1
    assert [options.seconds for options in seen] == [0.2, 3.0, 1.0, 1.0]
    assert [options.modes for options in seen] == [("cold",), ("cold",), ("cold", "hot"), ("cold", "hot")]
    assert "ort_2bit" in seen[3].baselines
    assert len(seen[0].baselines) == 2


@pytest.mark.skipif("cpu" not in {t.backend for t in targets()}, reason="the cpu backend is not available")
def test_overhead_is_what_forward_adds_to_its_kernel(capsys, tmp_path):
    path = tmp_path / "o.json"
    assert main(["bench", "--suite", "overhead", "--seconds", "0.05", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    records = json.loads(path.read_text())["overhead"]
    assert [(r["N"], r["K"]) for r in records] == list(overhead.SHAPES)
    for r in records:
        assert r["overhead_us"] == pytest.approx(r["forward"]["median_us"] - r["kernel"]["median_us"])
        assert f"{r['overhead_us']:.2f}" in out
        assert 0 < r["kernel"]["median_us"] < r["fused"]["median_us"]
        assert f"{r['apart']['median_us']:.2f}  " in out
    assert records[0]["kernel"]["median_us"] < records[0]["forward"]["median_us"]
    with pytest.raises(BackendError, match="forward called no kernel"):
        overhead.kernel_call(lambda x: x, torch.zeros(1, 4))


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
    assert set(found["compiled"]) == {"_C", "_C_cuda", "_host"}


def test_env_works_with_nothing_compiled(capsys, monkeypatch):
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
