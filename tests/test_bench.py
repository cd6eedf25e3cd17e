"""`lutgemm bench` and `lutgemm env`, the timer, and one benchmark of each op."""

import json
import re
import shlex
import sys
import time
from itertools import pairwise

import pytest
import torch

from lutgemm import _native
from lutgemm.accuracy import ACCURACIES
from lutgemm.backends import backends
from lutgemm.bench import layer, machine, overhead, peers, plot, readme, report, runner, shapes
from lutgemm.bench.baselines import BASELINES, ON_CUDA_ONLY, Baseline, rounding
from lutgemm.bench.records import Bandwidth, BaselineRecord, Record
from lutgemm.cli import main
from lutgemm.errors import ArgumentError, BackendError, CheckpointError
from lutgemm.ops import linear
from lutgemm.testing import hardware, timing
from lutgemm.testing.cases import CASES, OpCase
from lutgemm.testing.targets import Target, absent, targets

TINY = ["bench", "--shapes", "64x128", "--bits", "2", "--group-size", "64", "--m", "2", "--seconds", "0.02"]
FIELDS = """
op algorithm accuracy backend isa device threads mode M N K group_size dtype outliers bits_per_weight median_us p10_us
p90_us samples bytes_moved gb_per_s read_gb_per_s copy_gb_per_s bandwidth_percent speedup speedup_p10 error correct
message repro
"""
BASELINE_FIELDS = """
name device threads mode M N K bits_per_weight median_us p10_us p90_us samples bytes_moved gb_per_s read_gb_per_s
copy_gb_per_s bandwidth_percent error bound correct message
"""
PACKAGES = {"ort_4bit": "onnxruntime", "ort_2bit": "onnxruntime", "bnb_nf4": "bitsandbytes"}
"""Baselines of the extra bench-peers."""


@pytest.fixture(autouse=True)
def small_memory(monkeypatch):
    """Few cold copies and a quick look at the memory: these tests are about behaviour, not figures."""
    monkeypatch.setattr(timing, "cold_copies", lambda nbytes, total=None: 3)
    for module in (runner, layer):
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


def test_a_busy_machine_is_noted():
    header = machine.header()
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


def test_a_wrong_time_cannot_be_written_over_an_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("old")
    monkeypatch.setattr(report, "dumps", lambda header, records: "new")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(CheckpointError, match="disk is full"):
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
    assert machine.copy_bandwidth(1) > 0.1
    assert machine.read_bandwidth(1) > 0.1


def test_without_the_host_module_torch_measures_the_memory(monkeypatch):
    monkeypatch.setattr(_native, "host", lambda: (None, "it was left out"))
    assert machine.read_bandwidth(1) > 0.1


def test_threads_that_the_system_refuses(monkeypatch):
    def refuse(*_):
        raise RuntimeError("the system refused thread 900")

    with pytest.raises(ArgumentError, match="threads=1000 is not supported here: the system refused thread 900"):
        machine._best_pass(refuse, 1000)


def test_memory_is_as_fast_as_its_best_measurement():
    assert Bandwidth(5.0, 7.0).best(6.0, 3.0) == Bandwidth(6.0, 7.0)


@pytest.mark.parametrize(("k", "outliers"), [(256, False), (192, True)])
@pytest.mark.parametrize("name", [name for name in BASELINES if name not in ON_CUDA_ONLY])
def test_a_baseline_is_right_by_its_own_measure(name, k, outliers):
    """Against fp64 on its own weight: within its bound, and not by a bound that lets anything pass."""
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    x = OpCase(M=1, N=64, K=k, outliers=outliers).inputs().x
    prepared = BASELINES[name].prepare(layer.Request(64, k, cold=True, threads=1))
    calls = prepared.bind(x)
    assert len(calls) == 3
    truth = x.double() @ prepared.dense().double().T
    bound = BASELINES[name].bound(x)
    assert bound < (0.5 if outliers else 0.05)
    for call in calls:
        y = torch.as_tensor(call()).double()
        assert y.shape == (1, 64)
        assert (y - truth).norm() / truth.norm() <= bound
    bits = 8 * prepared.nbytes / (64 * k)
    assert {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4, "4bit": 4, "2bit": 2, "nf4": 4}[
        name.split("_")[1]
    ] == int(bits)


def test_rounding_of_blocks():
    x = torch.tensor([[0.0, 1.0, -1.0, 10.0, 0.0, 0.0]])
    step = torch.tensor([2 / 100, 10 / 100]).square().div(12).mean().sqrt()
    assert rounding(x, 100, 3) == pytest.approx(float(step / x.square().mean().sqrt()))
    assert rounding(x, 100) == pytest.approx(11 / 100 / 12**0.5 / float(x.square().mean().sqrt()))


@pytest.mark.parametrize("name", ["onnxruntime", "onnx", "bitsandbytes"])
def test_an_absent_package_is_reported_with_the_remedy(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    peers._nf4.cache_clear()
    wanted = {"onnxruntime": "ort_2bit", "onnx": "ort_2bit", "bitsandbytes": "bnb_nf4"}[name]
    if wanted == "ort_2bit" and name == "onnx":
        pytest.importorskip("onnxruntime")
    assert main([*TINY, "--op", "codebook_linear", "--hot", "--baselines", f"torch_bf16,{wanted}"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^absent: {wanted}: {name} cannot be imported .*lutgemm\[bench-peers\]", out, re.MULTILINE)
    assert re.search(r"torch_bf16 .*yes$", out, re.MULTILINE)
    assert len(re.findall(rf"^absent: {wanted}", out, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("name", "request_", "m", "message"),
    [
        (
            "torch_int4",
            layer.Request(64, 100, False, 1),
            1,
            "torch_int4 takes K a multiple of one of .128, 64, 32. here, got K=100",
        ),
        ("torch_int4", layer.Request(60, 128, False, 1), 1, "torch_int4 takes N a multiple of 16, got N=60"),
        ("torch_int4", layer.Request(64, 192, False, 1, "cuda"), 1, "K a multiple of 128 on cuda, got K=192"),
        ("torch_int8", layer.Request(64, 128, False, 1, "cuda"), 1, "torch_int8 runs on cpu"),
        ("gemv_bf16", layer.Request(64, 128, False, 2), 1, "dense GEMV has one thread"),
        ("gemv_fp32", layer.Request(64, 128, False, 1), 2, "dense GEMV takes one token, got M=2"),
    ],
)
def test_a_baseline_says_what_it_cannot_take(name, request_, m, message):
    with pytest.raises(BackendError, match=message):
        BASELINES[name].prepare(request_).bind(torch.randn(m, request_.K))


def test_peers_say_what_they_cannot_take():
    for package, prepare, message in (
        (
            "onnxruntime",
            lambda r: peers.onnxruntime_layer(r, 4),
            r"ONNX Runtime takes K a multiple of one of \[128, 64, 32\] here, got K=100",
        ),
        ("bitsandbytes", peers.bitsandbytes_layer, "N a multiple of 32 and K of 64 here"),
    ):
        pytest.importorskip(package)
        with pytest.raises(BackendError, match=message):
            prepare(layer.Request(65, 100, False, 1))


def test_a_wrong_baseline_is_reported_and_not_timed(monkeypatch, capsys):
    good = BASELINES["torch_bf16"]

    def prepare(request):
        made = good.prepare(request)
        return layer.Layer(made.dense, made.nbytes, lambda x: [lambda: 1.5 * made.bind(x)[0]()])

    monkeypatch.setitem(BASELINES, "torch_bf16", Baseline(good.label, prepare, good.bound))
    assert main([*TINY, "--op", "codebook_linear", "--hot", "--json", "-"]) == 0
    saved = json.loads(capsys.readouterr().out)
    assert {b["name"]: b["correct"] for b in saved["baselines"]} == {"torch_fp32": True, "torch_bf16": False}
    assert saved["baselines"][1]["median_us"] is None
    assert "is above its bound" in saved["baselines"][1]["message"]
    assert all(r["speedup"].keys() == {"torch_fp32"} for r in saved["records"])


HOST, NO_HOST = _native.host()


@pytest.mark.skipif(HOST is None, reason=str(NO_HOST))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", [0, 1, 2, 3])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 63), (5, 64), (7, 65), (4, 1000), (2, 0), (0, 8)])
def test_dense_gemv_on_every_instruction_set(dtype, isa, n, k):
    from lutgemm.backends import cpu

    if isa >= max(1, len(cpu.available_isas())):
        pytest.skip("this CPU has not that instruction set")
    weight, x, y = torch.randint(-4, 5, (n, k)).to(dtype), torch.randint(-4, 5, (k,)).float(), torch.full((n,), 9.0)
    name = str(dtype).removeprefix("torch.")
    HOST.dense_gemv(weight.data_ptr(), x.data_ptr(), y.data_ptr(), n, k, name, isa)
    assert torch.equal(y, weight.float() @ x), "small integers: sums are exact in any order"


@pytest.mark.skipif(HOST is None, reason=str(NO_HOST))
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"isa": 9}, "isa=9: this CPU has 0 to"),
        ({"isa": -2}, "isa=-2"),
        ({"N": -1}, "N=-1, K=2: must be >= 0"),
        ({"dtype": "float16"}, "dtype=float16: use float32 or bfloat16"),
        ({"x": 0}, "an address is 0"),
    ],
)
def test_dense_gemv_refuses(changes, message):
    x = torch.zeros(4)
    arguments = {"weight": x.data_ptr(), "x": x.data_ptr(), "y": x.data_ptr(), "N": 2, "K": 2, "dtype": "float32"}
    with pytest.raises(ValueError, match=message):
        HOST.dense_gemv(**(arguments | changes))


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


def test_a_saved_run_can_be_read_by_others(tmp_path):
    path = tmp_path / "run.json"
    report.write_json(path, {}, [])
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


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


def timed(name: str, us: float, m: int = 1, **changes) -> Record | BaselineRecord:
    """A record of a made-up time."""
    t = timing.Timing(us, us, us, 5)
    if name != "lutgemm":
        return BaselineRecord(name, m, 64, 128, "cpu", 1, "cold", "", 16, 16384, 0.0, 1.0, t)
    case = OpCase(M=m, N=64, K=128, **changes)
    return Record(case, "lut_gemm", "cpu", "avx2", "cpu", 1, "cold", case.bits, 4096, 0.0, True, "", t)


def test_the_plot_draws_one_shape_fastest_points_and_every_peer():
    beside = (timed("torch_bf16", 100.0), timed("ort_4bit", 25.0))
    ours = [timed("lutgemm", us, bits=bits) for us, bits in ((20.0, 2), (10.0, 2), (40.0, 4))]
    far = timed("lutgemm", 5.0, m=4, bits=2)
    records = [runner.replace(r, baselines=beside) for r in (*ours, far)]
    picture = plot.Picture.of({"cpu": "C"}, records)
    assert "64x128" in picture.title
    assert {name: {m: p.us for m, p in points.items()} for name, points in picture.ours.items()} == {
        "lutgemm 2-bit": {1: 10.0, 4: 5.0},
        "lutgemm 4-bit": {1: 40.0},
    }
    assert list(picture.peers) == ["torch bf16", "ONNX Runtime 4-bit"]
    point = picture.ours["lutgemm 2-bit"][1]
    assert point.intensity == 2 * 64 * 128 / 4096
    assert point.gflops == pytest.approx(2 * 64 * 128 / 10.0 / 1e3)
    with pytest.raises(ArgumentError, match="nothing to draw"):
        plot.Picture.of({"cpu": "C"}, [])


def test_the_readme_table_has_a_ratio_for_every_baseline():
    beside = (timed("torch_bf16", 100.0), timed("ort_4bit", 25.0))
    records = [
        runner.replace(timed("lutgemm", us, bits=bits, group_size=g), baselines=beside)
        for us, bits, g in ((50.0, 2, 128), (40.0, 4, 64))
    ]
    header = {"cpu": "C", "torch": "T", "date": "2026-01-01T00", "command": "c"}
    text = readme.kernel_table(json.loads(report.dumps(header, records)))
    assert text.splitlines()[0].startswith("| weights | accuracy |")
    assert "| x bf16 | x ONNX Runtime 4-bit |" in text
    assert "| BCQ 2-bit | exact | 2.00 | 64x128 | 1 | `lut_gemm` | 50 | 2.0 | **0.50** |" in text
    assert "| BCQ 4-bit g64 |" in text


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
