"""How the Triton kernels cut a problem: candidates, their cost, the user's tuned ones; why the backend is absent."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lutgemm
from lutgemm.backends import Problem
from lutgemm.backends import triton as backend
from lutgemm.backends import tuned as on_cpu
from lutgemm.errors import BackendError, CheckpointError

pytestmark = pytest.mark.skipif(backend.missing() is not None, reason=f"backend triton: {backend.missing()}")

if backend.missing() is None:
    from lutgemm.kernels import config, tuned
    from lutgemm.kernels.config import Config, Device, Task

    BCQ = [Task(a, m, n, k, 3, 32, g, 2) for a in ("lut_gemm", "biqgemm", "dequant_gemm")
           for m, n, k, g in ((1, 4096, 4096, 4), (8, 130, 1100, 3), (1, 1, 1, 1), (64, 28672, 4096, 128))]  # fmt: skip
    BOOKS = [Task(a, m, 4096, 4096, 1, 4, 32, 2, 256) for a in ("codegemm", "dequant_gemm") for m in (1, 4, 33)]
    TASKS = BCQ + BOOKS


@pytest.fixture(params=range(len(TASKS)) if backend.missing() is None else [])
def task(request: pytest.FixtureRequest) -> "Task":
    return TASKS[request.param]


def test_candidates_cover_the_problem_within_the_limits_of_triton(task: "Task"):
    for warp in (32, 64):
        device = Device(132, warp)
        found = config.candidates(task, device)
        assert found
        costs = [config.estimate_us(task, cut, device) for cut in found]
        assert costs == sorted(costs)
        assert all(cost > 0 for cost in costs)
        for cut in found:
            sizes = (cut.block_m, cut.block_n, cut.chunk, cut.chunks, cut.num_warps)
            assert all(n == config.power_of_two(n) for n in sizes), cut
            unit = 8 if task.algorithm in ("lut_gemm", "biqgemm") else 1
            assert cut.block_m * cut.block_n * cut.chunk * cut.chunks * unit <= config.MAX_ELEMENTS
            if task.algorithm in ("lut_gemm", "biqgemm"):
                assert cut.chunks * 16 == cut.num_warps * warp, "a table for each half of each warp"
            if task.algorithm == "dequant_gemm":
                assert min(cut.block_m, cut.block_n, cut.chunk * task.unit) >= 16, "what tl.dot takes"
            steps = config.num_steps(task, cut)
            assert steps * cut.chunk * cut.chunks >= task.units


def test_a_decode_call_fills_the_gpu():
    for task in TASKS[:1] + BOOKS[:1]:
        cut = config.candidates(task, Device(132))[0]
        assert -(-task.N // cut.block_n) * cut.splits >= 0.9 * 132


@pytest.mark.parametrize(("steps", "splits"), [(1, 1), (7, 3), (8, 3), (64, 64), (5, 9), (100, 7)])
def test_no_part_is_empty(steps: int, splits: int):
    parts, each = config.split_evenly(steps, splits)
    assert 1 <= parts <= splits
    assert (parts - 1) * each < steps <= parts * each


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(on_cpu.VARIABLE, "1")
    tuned.forget()
    yield tmp_path / "lutgemm" / "tuned-triton.json"
    tuned.forget()


def fastest(times: dict, task: "Task") -> "list[tuned.Measured]":
    """`measure` of a run that does nothing, candidate i taking times[i] or a second."""
    order = {cut: i for i, cut in enumerate(config.candidates(task, Device()))}
    last = []

    def run(cut: "Config") -> torch.Tensor:
        last[:] = [cut]
        return torch.ones(2)

    return tuned.measure(task, Device(), run, lambda call: (call(), times.get(order[last[0]], 1e6))[1])


def test_what_was_measured_is_taken_for_problems_of_its_class(file: Path):
    task = TASKS[0]._replace(M=5)
    results = fastest({3: 10.0, 1: 20.0}, task)
    assert len(results) == tuned.CANDIDATES
    wanted = config.candidates(task, Device())[3]
    assert results[0] == tuned.Measured(wanted, 10.0)
    tuned.save(file, "some GPU", tuned.best([(task, results)]))
    assert tuned.find(task, "some GPU") == wanted
    assert tuned.find(task._replace(M=8), "some GPU") == wanted
    assert tuned.find(task._replace(M=9), "some GPU") is None
    assert tuned.find(task, "another GPU") is None


def test_the_status_says_where_sizes_are_from(file: Path, monkeypatch: pytest.MonkeyPatch):
    assert tuned.status("A") == "estimated; `lutgemm tune --backend triton` measures them"
    tuned.save(file, "A", {TASKS[0]: config.candidates(TASKS[0], Device())[2]})
    assert tuned.status("A") == f"measured for 1 problems ({file}), else estimated"
    monkeypatch.setenv(on_cpu.VARIABLE, "0")
    assert tuned.status("A") == "estimated (LUTGEMM_TUNED=0)"
    monkeypatch.setenv(on_cpu.VARIABLE, "1")
    file.write_text("{}")
    assert "this lutgemm reads" in tuned.status("A")


@pytest.mark.parametrize(
    ("options", "formats"),
    [
        ([], ["2", "3", "4", "1x4", "2x8"]),
        (["--bits", "5"], ["5"]),
        (["--codebooks", "1x8", "--codebooks", "4x4"], ["1x8", "4x4"]),
        (["--bits", "1", "--codebooks", "1x8"], ["1", "1x8"]),
    ],
)
def test_which_layers_the_command_tunes(options: list[str], formats: list[str], monkeypatch: pytest.MonkeyPatch):
    from lutgemm.cli import main
    from lutgemm.kernels import tuning

    asked = []
    monkeypatch.setattr(backend, "BACKEND", replace(backend.BACKEND, unavailable=lambda: None))
    monkeypatch.setattr(tuning, "tune_triton", lambda layers, **_: asked.extend(layers) or {})
    assert main(["tune", "--backend", "triton", "--quick", "--dry-run", *options]) == 0
    assert {(case.N, case.K, case.dtype, case.group_size) for case in asked} == {(4096, 4096, "float16", 128)}
    bits = [str(case.bits) for case in asked if case.op == "bcq_linear"]
    assert bits + [f"{c.num_codebooks}x{c.vec_len}" for c in asked if c.op == "codebook_linear"] == formats


def test_entries_of_other_gpus_and_classes_stay(file: Path):
    one, other = TASKS[0], TASKS[1]
    first, second = (config.candidates(task, Device())[2] for task in (one, other))
    tuned.save(file, "A", {one: first})
    tuned.save(file, "B", {one: first})
    tuned.save(file, "A", {tuned.problem_class(other): second})
    assert len(json.loads(file.read_text())["entries"]) == 2
    assert (tuned.find(one, "A"), tuned.find(other, "A"), tuned.find(one, "B")) == (first, second, first)


def test_tuning_can_be_switched_off(file: Path, monkeypatch: pytest.MonkeyPatch):
    tuned.save(file, "A", {TASKS[0]: config.candidates(TASKS[0], Device())[2]})
    monkeypatch.setenv(on_cpu.VARIABLE, "0")
    assert tuned.find(TASKS[0], "A") is None


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda d: d | {"version": 2}, "this lutgemm reads"),
        (lambda d: d | {"entries": 3}, "no list of objects"),
        (lambda d: d["entries"][0].update(configs=4) or d, "'configs' is no list"),
        (lambda d: d["entries"][0]["configs"][0].update(config=[1, 2]) or d, "config .* is none"),
        (lambda d: d["entries"][0]["configs"][0].update(config=[1, 4096, 4, 8, 1, 4, 3]) or d, "is no candidate"),
        (lambda d: d["entries"][0]["configs"][0]["config"].__setitem__(4, 10**6) or d, "is no candidate"),
        (lambda d: d["entries"][0]["configs"][0]["task"].__setitem__(0, "rm") or d, "task .* is none"),
        (lambda d: d["entries"][0]["configs"][0]["task"].__setitem__(2, -1) or d, "task .* is none"),
        (lambda d: d["entries"][0].update(configs=[5]) or d, "a row has no"),
    ],
)
def test_a_file_that_cannot_be_believed_is_passed_over(file: Path, damage, text: str):
    tuned.save(file, "A", {TASKS[0]: config.candidates(TASKS[0], Device())[2]})
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError, match=text):
        tuned.read(file, "A")
    with pytest.warns(RuntimeWarning, match="tuned configurations are not used"):
        assert tuned.find(TASKS[0], "A") is None


def test_candidates_that_do_not_compile_are_left_out_and_wrong_ones_are_reported():
    from triton import OutOfResources

    task = TASKS[0]
    found = config.candidates(task, Device())

    def too_large(cut: "Config") -> torch.Tensor:
        if cut == found[0]:
            raise OutOfResources(300000, 232448, "shared memory")
        return torch.ones(2)

    results = tuned.measure(task, Device(), too_large, lambda call: 1.0)
    assert found[0] not in [one.config for one in results]
    with pytest.raises(BackendError, match="gives another result"):
        tuned.measure(task, Device(), lambda cut: torch.full((2,), float(cut.block_n + cut.splits)), lambda call: 1.0)


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match="while a CUDA graph is captured"):
        tuned.measure(TASKS[0], Device(), lambda cut: torch.ones(1), lambda call: 1.0)


@pytest.mark.skipif(torch.cuda.is_available() or backend.INTERPRETED, reason="the backend is there")
def test_its_absence_is_explained():
    reason = lutgemm.backends()["triton"]
    assert reason is not None
    assert "TRITON_INTERPRET=1" in reason
    layer = torch.zeros(1, 32)
    weight = lutgemm.quantize_bcq(torch.randn(4, 32), bits=1, group_size=32)
    with pytest.raises(BackendError, match="there is no GPU that torch can use"):
        lutgemm.bcq_linear(layer, weight, backend="triton")


def test_the_package_works_without_triton():
    """And importing it imports neither Triton nor the kernels."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, lutgemm\n"
        "w = lutgemm.quantize_bcq(torch.randn(4, 32), bits=1, group_size=32)\n"
        "lutgemm.bcq_linear(torch.zeros(1, 32), w)\n"
        "assert 'lutgemm.kernels' not in sys.modules\n"
        "print(lutgemm.backends()['triton'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "triton is not installed; pip install 'lutgemm[triton]'" in done.stdout, done.stderr


def test_choices_by_tokens():
    problem = Problem("bcq_linear", "cuda", torch.float16, 1, 4096, 4096, 128, 3, "free")
    chosen = [backend.BACKEND.choose(problem._replace(M=m)) for m in (1, 2, 8, 16, 512, 513)]
    assert chosen == ["lut_gemm", "biqgemm", "biqgemm", "dequant_gemm", "dequant_gemm", "dequantize"]
    assert backend.BACKEND.choose(problem._replace(M=16, dtype=torch.float32)) == "dequantize"
    books = problem._replace(op="codebook_linear", vec_len=4, codebook_bits=8, planes=1)
    assert [backend.BACKEND.choose(books._replace(M=m)) for m in (1, 4, 5)] == ["codegemm", "codegemm", "dequant_gemm"]
