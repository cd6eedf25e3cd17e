"""`lutgemm tune --device cuda`: from times to thresholds, and the verb.

Without a GPU: a clock tells made-up times, the calls that it is given run on the CPU.
"""

import json
import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import REQUIRED
from gpu_thresholds import GPU, OFFERED, OTHERS, PROBLEM, cache_file, chosen, entry, row
from tuned_entries import put

import lutgemm
from lutgemm import tuning_gpu
from lutgemm.accuracy import ACCURACIES
from lutgemm.backends import cpu, cuda, tuned_file, tuned_gpu
from lutgemm.backends.gpu_heuristics import GPU_THRESHOLDS
from lutgemm.backends.gpu_layouts import algorithms
from lutgemm.backends.heuristics import NO_CROSSING
from lutgemm.backends.tuned_gpu import Gpu
from lutgemm.cli import _tune_gpu, main
from lutgemm.errors import ArgumentError, BackendError
from lutgemm.testing.cases import OpCase
from lutgemm.testing.timing import Timing
from lutgemm.tuning_gpu import Kind, Study, segments

file = pytest.fixture(autouse=True)(cache_file)
needs_kernels = pytest.mark.skipif(cpu.BACKEND.unavailable() is not None, reason="no CPU kernels")


# from times to rows


def test_each_stretch_goes_to_the_fastest():
    times = {m: {"lut_gemm": m, "bit_planes": 2 + m / 8, "dequantize": 40 + m / 100} for m in (1, 2, 4, 64, 512, 1024)}
    assert segments(tuning_gpu.losses([times])) == [("lut_gemm", 2), ("bit_planes", 64), ("dequantize", NO_CROSSING)]


def test_little_gain_is_not_worth_a_row():
    steady = {m: {"a": 1.0, "dequantize": 9.0} for m in (1, 2, 4, 8)}
    faster = {**steady, 2: {"a": 1.0, "b": 0.92, "dequantize": 9.0}}
    assert segments(tuning_gpu.losses([faster])) == [("a", 8), ("dequantize", NO_CROSSING)]
    faster[2]["b"] = 0.88
    assert segments(tuning_gpu.losses([faster]))[:3] == [("a", 1), ("b", 2), ("a", 8)]
    faster = {m: {"a": 1.0, "b": 0.97, "dequantize": 9.0} for m in (1, 2, 4, 8)}
    assert segments(tuning_gpu.losses([faster]))[0] == ("b", 8)


def test_an_algorithm_is_taken_where_it_was_measured_only():
    times = {m: {"a": 1.0, "dequantize": 9.0} for m in (1, 2)} | {m: {"dequantize": 9.0} for m in (4, 8)}
    assert segments(tuning_gpu.losses([times])) == [("a", 2), ("dequantize", NO_CROSSING)]
    assert segments(tuning_gpu.losses([{1: {"dequantize": 1.0}}])) == [("dequantize", NO_CROSSING)]


def test_shapes_count_alike_whatever_their_times():
    small = {1: {"a": 1.0, "b": 1.5}}
    large = {1: {"a": 180.0, "b": 100.0}}
    assert segments(tuning_gpu.losses([small, large]))[0] == ("b", 1)
    assert segments(tuning_gpu.losses([small, small, large]))[0] == ("a", 1)
    missing = {1: {"a": 1.0}}
    assert segments(tuning_gpu.losses([missing, large]))[0] == ("a", 1)


def kinds_with_random_winners(seed):
    """Kinds, and the algorithm that wins by far at each M."""
    draw = random.Random(seed)
    kinds = [
        Kind(op, scale_kind, accuracy, x_bytes, cost)
        for op, scale_kind in (("bcq_linear", ""), ("bcq_linear", "uniform"), ("codebook_linear", ""))
        for accuracy in tuning_gpu.LEVELS
        for x_bytes in (2, 4)
        for cost in (1, 2, 4)
    ]
    draw.shuffle(kinds)
    return {kind: {m: draw.choice(OFFERED[kind.op]) for m in (1, 4, 16, 64)} for kind in kinds}


@pytest.mark.parametrize("seed", range(5))
def test_rows_choose_what_won(seed):
    winners = kinds_with_random_winners(seed)
    studies = [
        Study(kind, {m: {name: 1.0 if name == best else 3.0 for name in OFFERED[kind.op]} for m, best in won.items()})
        for kind, won in winners.items()
    ]
    rows = tuning_gpu.thresholds(studies, "here", "2026-01-02")
    assert {(r.device, r.date) for r in rows} == {("here", "2026-01-02")}
    for kind, won in winners.items():
        limits = row(kind.op, scale_kind=kind.scale_kind, max_cost=kind.cost, max_x_bytes=kind.x_bytes)
        problem = tuning_gpu.problem_of(replace(limits, max_accuracy=kind.accuracy))
        for m, best in won.items():
            assert chosen(problem._replace(M=m), rows) == best
        assert chosen(problem._replace(M=65), rows) == "dequantize"


def test_neighbours_are_answered_by_the_next_measured():
    times = {cost: {1: {"lut_gemm": cost, "biqgemm": 4.5, "dequantize": 99.0}} for cost in (2, 4, 8)}
    kinds = [Kind("bcq_linear", "", "accurate", 2, cost) for cost in times]
    rows = tuning_gpu.thresholds([Study(k, times[k.cost]) for k in kinds], "here", "2026-01-02")
    assert [(r.max_cost, r.algorithm) for r in rows] == [
        (4, "lut_gemm"),
        (4, "dequantize"),
        (8, "biqgemm"),
        (8, "dequantize"),
    ]
    one = PROBLEM._replace(M=1)
    assert chosen(one._replace(planes=1), rows) == "lut_gemm"
    assert chosen(one._replace(planes=3, dtype=torch.bfloat16, accuracy=0, scale_kind="ratio"), rows) == "lut_gemm"
    assert chosen(one._replace(planes=5, scale_kind="uniform"), rows) == "biqgemm"
    # what was not measured is left to the rows behind
    for other in (one._replace(dtype=torch.float32), one._replace(accuracy=3)):
        assert chosen(other, rows) == "dequantize"
        assert chosen(other, rows + GPU_THRESHOLDS) == "lut_gemm"


# measuring


def made_up(timed):
    """Microseconds: lut_gemm wins at 1 token, biqgemm up to 8, all worse in fp32 tables."""
    exact = 2.0 if timed.accuracy == "exact" else 1.0
    each = {"lut_gemm": 4 * timed.M, "biqgemm": 5 + timed.M, "codegemm": 2 * timed.M, "dequantize": 14 + timed.M / 64}
    return each[timed.algorithm] * (1.0 if timed.algorithm == "dequantize" else exact)


@pytest.fixture
def clock(monkeypatch):
    """A clock that tells `made_up` times, and lists what it was asked for."""
    monkeypatch.setattr(tuning_gpu, "cold_bytes", lambda device: 20_000)
    asked = []

    def tell(calls, seconds):
        asked.extend((timed, len(copies)) for timed, copies in calls.items())
        return {timed: Timing(made_up(timed), 0.0, 0.0, 1) for timed in calls}

    tell.asked = asked
    return tell


WEIGHTS = [
    OpCase(M=1, N=32, K=64, bits=2),
    OpCase("codebook_linear", M=1, N=32, K=64, codebook_bits=8, vec_len=8),
    OpCase(M=1, N=64, K=64, bits=2),
]


@needs_kernels
def test_weights_are_measured(clock):
    studies = tuning_gpu.study(WEIGHTS, cpu.BACKEND, "cpu", (1, 2, 8, 16), 1.0, clock)
    assert len(studies) == 6 + 6 + 1
    assert {study.kind.cost for study in studies} == {1, 2}
    assert all(copies >= 2 for _, copies in clock.asked)
    timed = [t for t, _ in clock.asked]
    assert {t.accuracy for t in timed if t.algorithm == "dequantize"} == {"accurate"}
    assert {t.accuracy for t in timed if t.algorithm == "codegemm"} == {"accurate", "near-exact", "exact"}
    assert {t.M for t in timed if (t.algorithm, t.accuracy) == ("lut_gemm", "accurate")} == {1, 2, 8}
    rows = tuning_gpu.thresholds(studies, "here", "2026-01-02")

    def at(accuracy):
        asked = PROBLEM._replace(planes=2, accuracy=ACCURACIES.index(accuracy))
        return [chosen(asked._replace(M=m), rows) for m in (1, 2, 8, 16)]

    assert at("fast") == at("near-exact") == ["lut_gemm", "biqgemm", "biqgemm", "dequantize"]
    assert at("exact") == ["lut_gemm", "dequantize", "dequantize", "dequantize"]


@needs_kernels
def test_a_wrong_result_is_not_timed(clock, monkeypatch):
    right = tuning_gpu.linear

    def wrong(x, weight, *, algorithm, **choice):
        return right(x, weight, algorithm=algorithm, **choice) * (1.1 if algorithm == "biqgemm" else 1.0)

    monkeypatch.setattr(tuning_gpu, "linear", wrong)
    with pytest.raises(BackendError, match=r"biqgemm on bcq-1x32x64 with M=1 and float16 differs.*9\.|1\.0e-01"):
        tuning_gpu.study(WEIGHTS, cpu.BACKEND, "cpu", (1,), 1.0, clock)
    assert not clock.asked


@needs_kernels
def test_too_little_memory_is_said(clock, monkeypatch):
    def full(calls, seconds):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(BackendError, match=r"does not hold copies of a weight of 32 x 64.*--quick"):
        tuning_gpu.study(WEIGHTS, cpu.BACKEND, "cpu", (1,), 1.0, full)


def test_the_weights_are_those_that_rows_tell_apart():
    cases = tuning_gpu.cases()
    assert {(case.N, case.K) for case in cases} == set(tuning_gpu.SHAPES)
    kinds = {tuning_gpu._kind(replace(case, dtype="float16", accuracy="accurate")) for case in cases}
    assert {kind.cost for kind in kinds if kind[:2] == ("bcq_linear", "")} == set(tuning_gpu.PLANES)
    assert {kind.cost for kind in kinds if kind.scale_kind} == set(tuning_gpu.UNIFORM_BITS)
    assert {kind.cost for kind in kinds if kind.op == "codebook_linear"} == {1, 2, 4, 8}
    assert set(tuning_gpu.ONE_WAY) < {name for _, name in algorithms()}


def test_nothing_is_measured_without_the_backend_or_in_a_capture(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(cuda, "BACKEND", replace(cuda.BACKEND, unavailable=lambda: "no wings"))
        with pytest.raises(BackendError, match="the CUDA backend cannot run: no wings"):
            tuning_gpu.measure(WEIGHTS)
    monkeypatch.setattr(cuda, "BACKEND", replace(cuda.BACKEND, unavailable=lambda: None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match="captured would time nothing"):
        tuning_gpu.measure(WEIGHTS)


# the verb


@pytest.fixture
def gpu(monkeypatch, clock):
    """A machine that seems to have one GPU; `lutgemm tune` measures small weights on the CPU by the made-up clock."""
    real = tuning_gpu.study

    def on_cpu(weights, backend, device, tokens, seconds, timer, progress):
        return real(weights, cpu.BACKEND, "cpu", tokens, seconds, clock, progress)

    monkeypatch.setattr(cuda, "BACKEND", replace(cuda.BACKEND, unavailable=lambda: None))
    monkeypatch.setattr(tuning_gpu, "study", on_cpu)
    monkeypatch.setattr(_tune_gpu, "QUICK", (((32, 64),), (1, 2, 8, 16), 0.1))
    monkeypatch.setattr(Gpu, "of", lambda index: GPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning_gpu, "PLANES", (1, 2, 8))


@needs_kernels
def test_a_quick_run(gpu, file, capsys):
    assert main(["tune", "--device", "cuda", "--quick"]) == 0
    out, err = capsys.readouterr()
    assert f"written to {file}" in err
    assert out.startswith("algorithms and the tokens (M) up to which each is taken on Some GPU (capability 9.0, 132")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "bcq, up to 8 bits fp16, bf16 accurate lut_gemm 1, biqgemm 8, dequantize" in lines
    assert "before: bit_planes 16, dequant_gemm 256, dequantize" in lines
    found = tuned_gpu.find(GPU)
    assert (found.lutgemm, found.torch) == (lutgemm.__version__, torch.__version__)
    assert tuned_gpu.rows() == found.rows + GPU_THRESHOLDS
    assert chosen(PROBLEM._replace(M=1)) == "lut_gemm"
    assert tuned_gpu.status().startswith("tuned on ")
    assert main(["tune", "--backend", "cuda", "--reset"]) == 0
    assert capsys.readouterr().out == f"1 entry removed from {file}\n"
    assert not file.exists()
    assert tuned_gpu.rows() is GPU_THRESHOLDS


@needs_kernels
def test_a_dry_run_writes_nothing(gpu, file, tmp_path, capsys):
    assert main(["tune", "--device", "cuda:0", "--quick", "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["written"], found["file"]) == (False, str(file))
    assert found["before"] == [tuned_gpu.row_to_json(r) for r in GPU_THRESHOLDS]
    assert tuned_gpu.entry_from_json(found["entry"], file).gpu == GPU
    assert "written" not in err
    assert list(tmp_path.iterdir()) == []


@needs_kernels
def test_it_says_when_results_will_not_be_used(gpu, file, capsys, monkeypatch):
    monkeypatch.setattr(tuned_gpu, "kinds", lambda: [GPU, OTHERS[0]["gpu"]])
    assert main(["tune", "--device", "cuda", "--quick"]) == 0
    assert "set CUDA_VISIBLE_DEVICES to those of one: calls do not use it" in capsys.readouterr().err
    monkeypatch.setenv(tuned_file.VARIABLE, "0")
    tuned_gpu.forget()
    assert main(["tune", "--device", "cuda", "--quick"]) == 0
    assert "LUTGEMM_TUNED=0 is set: calls do not use it" in capsys.readouterr().err


REFUSED = {
    "--device cuda": "the CUDA backend cannot run: no wings",
    "--backend cuda": "the CUDA backend cannot run: no wings",
    "--device cuda --reset": "device='cuda': torch sees no GPU; check the driver",
    "--device cpu --backend cuda": "backend='cuda' does not run on device='cpu'",
    "--device cuda --backend cpu": "backend='cpu' does not run on device='cuda'",
    "--device npu": "the CUDA backend cannot run: no wings",
    "--device cuda --threads 2": "threads=2: a GPU has none to set",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_refusals(arguments, capsys, monkeypatch):
    monkeypatch.setattr(cuda, "BACKEND", replace(cuda.BACKEND, unavailable=lambda: "no wings"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["tune", *arguments.split()]) == 1
    out, err = capsys.readouterr()
    assert REFUSED[arguments] in err
    assert not out


def test_the_gpu_must_be_there(gpu):
    assert _tune_gpu.device_index("cuda") == _tune_gpu.device_index("cuda:0") == 0
    for device, text in {"cuda:1": "torch sees 1 GPU; use cuda:0", "meta": "use cpu, cuda", "a:b": "unknown"}.items():
        with pytest.raises(ArgumentError, match=text):
            _tune_gpu.device_index(device)


def test_reset_of_block_sizes_is_of_tritons_file(tmp_path, capsys):
    pytest.importorskip("triton")
    from lutgemm.kernels import tuned as of_triton

    path = tmp_path / "lutgemm" / "tuned-triton.json"
    entries = [{"device": name} for name in (of_triton.device_name(None), "Other")]
    put(path, {"format": of_triton.FORMAT, "version": of_triton.FORMAT_VERSION, "entries": entries})
    if torch.cuda.is_available():
        entries[0]["device"] = of_triton.device_name(torch.cuda.current_device())
    assert main(["tune", "--backend", "triton", "--reset"]) == 0
    assert capsys.readouterr().out == f"1 entry removed from {path}\n"
    assert [e["device"] for e in json.loads(path.read_bytes())["entries"]] == ["Other"]


def test_env_shows_which_thresholds_gpus_use(file, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU.name)
    tuned_gpu.save(file, entry())
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    where = lines.index("gpu          Some GPU")
    assert lines[where + 1] == f"thresholds   tuned on 2026-01-02 with torch 2.13.0 ({file})"


@pytest.mark.gpu
@pytest.mark.skipif(bool(cuda.BACKEND.unavailable()) and "cuda" not in REQUIRED, reason="backend cuda")
def test_a_gpu_is_measured():
    weights = [OpCase(M=1, N=256, K=512, bits=2, group_size=128)]
    found = tuning_gpu.measure(weights, (1, 16, 256), 0.1)
    assert found.gpu == Gpu.of(0)
    assert {r.algorithm for r in found.rows} <= set(OFFERED["bcq_linear"])
    assert [r.max_tokens for r in found.rows].count(NO_CROSSING) == len({tuning_gpu.problem_of(r) for r in found.rows})
