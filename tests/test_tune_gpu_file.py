"""The file of `lutgemm tune --device cuda`: what is kept, what is refused, and calls that follow it."""

import json
import os
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from gpu_thresholds import GPU, OTHERS, PROBLEM, cache_file, chosen, document, entry, row
from tuned_entries import put

from lutgemm.backends import cuda, select, tuned, tuned_file, tuned_gpu
from lutgemm.backends.gpu_heuristics import GPU_THRESHOLDS
from lutgemm.backends.heuristics import NO_CROSSING
from lutgemm.errors import BackendError, CheckpointError

file = pytest.fixture(autouse=True)(cache_file)


# the file


def test_an_entry_comes_back_as_it_was_written(file):
    rows = [
        row(),
        row("codebook_linear", "codegemm", NO_CROSSING, max_cost=2.5, max_x_bytes=2, max_accuracy="accurate"),
        row(scale_kind="uniform", max_cost=4),
    ]
    tuned_gpu.save(file, entry(rows))
    assert tuned_gpu.find(GPU) == entry(rows)
    found = json.loads(file.read_bytes())["entries"][0]
    assert (found["gpu"], found["capability"], found["multiprocessors"]) == GPU
    assert [r["max_tokens"] for r in found["rows"]] == [9, None, 9]
    assert found["rows"][0]["max_cost"] is None
    assert tuned_gpu.rows() == (*rows, *GPU_THRESHOLDS)


@pytest.mark.parametrize("change", OTHERS)
def test_an_entry_of_another_gpu_is_passed_over_in_silence(change, file):
    tuned_gpu.save(file, entry(**change))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned_gpu.rows() is GPU_THRESHOLDS


@pytest.mark.parametrize("seen", [[], [GPU, OTHERS[0]["gpu"]]])
def test_without_one_kind_of_gpu_built_in_rows_count(seen, file, monkeypatch):
    tuned_gpu.save(file, entry())
    monkeypatch.setattr(tuned_gpu, "kinds", lambda: seen)
    assert tuned_gpu.rows() is GPU_THRESHOLDS
    assert ("several kinds; set CUDA_VISIBLE_DEVICES" if seen else "no GPU") in tuned_gpu.status()


def test_entries_are_kept_side_by_side(file):
    other = OTHERS[0]["gpu"]
    for one in (entry(), entry(gpu=other), entry([row(tokens=99)])):
        tuned_gpu.save(file, one)
    assert [e["gpu"] for e in tuned_gpu.FILE.read(file)] == ["Other", "Some GPU"]
    assert tuned_gpu.rows()[0].max_tokens == 99
    assert tuned_gpu.reset(file, GPU, dry_run=True) == tuned_gpu.reset(file, GPU) == 1
    assert tuned_gpu.reset(file, GPU) == 0
    assert tuned_gpu.reset(file, other) == 1
    assert not file.exists()


GOOD = entry([row(max_cost=6.5)]).to_json()


BAD_ROWS = [
    {"op": "softmax"},
    {"op": ["bcq_linear"]},
    {"algorithm": "codegemm"},
    {"algorithm": None},
    {"scale_kind": "free"},
    {"scale_kind": []},
    {"max_accuracy": "perfect"},
    {"max_accuracy": None},
    {"max_x_bytes": 3},
    {"max_x_bytes": 2.0},
    {"max_x_bytes": True},
    {"max_cost": 0},
    {"max_cost": "8"},
    {"max_cost": True},
    {"max_tokens": -1},
    {"max_tokens": 1.5},
    {"max_tokens": 2**63},
    {"more": 1},
]


DAMAGED = {
    "empty": b"",
    "cut": json.dumps(document(GOOD)).encode()[:-9],
    "not text": b"\xff\xfe\x00",
    "a list": [],
    "the processor's file": document(GOOD) | {"format": tuned.FORMAT},
    "a later version": document() | {"version": 2},
    "entries as an object": document() | {"entries": {}},
    "huge": b" " * (tuned_file.FILE_LIMIT + 1),
    "nan": json.dumps(document(GOOD)).replace("6.5", "NaN").encode(),
    "infinite": json.dumps(document(GOOD)).replace("6.5", "1e999").encode(),
    "key twice": json.dumps(document(GOOD)).replace('"torch"', '"date"').encode(),
    "no date": document({k: v for k, v in GOOD.items() if k != "date"}),
    "date that moves the cursor": document(GOOD | {"date": "\x1b[2J"}),
    "rows as a number": document(GOOD | {"rows": 3}),
    "row that is none": document(GOOD | {"rows": [7]}),
    "too many rows": document(GOOD | {"rows": GOOD["rows"] * (tuned_gpu.MAX_ROWS + 1)}),
    **{f"row {change}": document(GOOD | {"rows": [GOOD["rows"][0] | change]}) for change in BAD_ROWS},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_file_is_ignored_with_one_warning(content, file):
    put(file, content)
    with pytest.warns(RuntimeWarning, match="tuned thresholds are not used") as caught:
        assert tuned_gpu.rows() is GPU_THRESHOLDS
    assert tuned_gpu.rows() is GPU_THRESHOLDS
    assert len(caught) == 1
    text = str(caught[0].message)
    assert str(file) in text
    assert "run `lutgemm tune --device cuda` again, or delete the file" in text
    assert len(text) < 1000
    assert text.isprintable()


def test_costs_beyond_floating_point_are_numbers(file):
    put(file, json.dumps(document(GOOD)).replace("6.5", "9" * 400).encode())
    assert chosen(PROBLEM) == "biqgemm"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_does_not_hang(file):
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    with pytest.warns(RuntimeWarning, match="tuned thresholds are not used"):
        assert tuned_gpu.rows() is GPU_THRESHOLDS


def test_a_damaged_file_is_replaced_and_removed(file):
    put(file, b"{")
    tuned_gpu.save(file, entry())
    assert tuned_gpu.find(GPU) is not None
    put(file, b"{")
    assert tuned_gpu.reset(file, GPU) == 1
    assert not file.exists()
    file.mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        tuned_gpu.save(file, entry())


def test_without_a_home_built_in_rows_count(monkeypatch):
    def no_home():
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert tuned_gpu.rows() is GPU_THRESHOLDS
    assert "lutgemm tune --device cuda" in tuned_gpu.status()


def test_the_variable_switches_it_off(file, monkeypatch):
    put(file, b"damaged")
    monkeypatch.setenv(tuned_file.VARIABLE, "0")
    assert tuned_gpu.rows() is GPU_THRESHOLDS
    assert tuned_gpu.status() == "built in (LUTGEMM_TUNED=0)"
    monkeypatch.setenv(tuned_file.VARIABLE, "no")
    tuned_gpu.forget()
    with pytest.raises(BackendError, match="LUTGEMM_TUNED='no' is unknown; use 0"):
        tuned_gpu.rows()


def test_status(file):
    assert tuned_gpu.status() == "built in; `lutgemm tune --device cuda` measures this GPU"
    tuned_gpu.save(file, entry(lutgemm="0.0.1"))
    assert "are for lutgemm 0.0.1; run `lutgemm tune --device cuda` again" in tuned_gpu.status()
    tuned_gpu.save(file, entry())
    assert tuned_gpu.status() == f"tuned on 2026-01-02 with torch 2.13.0 ({file})"


# calls


@pytest.fixture
def present(monkeypatch):
    """The CUDA backend's choices, as if its kernels could run."""
    monkeypatch.setattr(cuda, "BACKEND", replace(cuda.BACKEND, unavailable=lambda: None))
    monkeypatch.setattr(import_module("lutgemm.backends"), "registry", lambda: {"cuda": cuda.BACKEND})


def test_calls_follow_the_file_and_read_it_once(file, monkeypatch, present):
    assert select(PROBLEM)[1] == "bit_planes"
    rows = [row(algorithm="dequant_gemm", tokens=5, max_accuracy="accurate"), row(algorithm="dequantize")]
    tuned_gpu.save(file, entry(rows))
    assert select(PROBLEM)[1] == "bit_planes"
    tuned_gpu.forget()
    reads, read = [], tuned_file.TunedFile.read
    monkeypatch.setattr(tuned_file.TunedFile, "read", lambda self, path: reads.append(path) or read(self, path))
    assert select(PROBLEM)[1] == "dequant_gemm"
    assert select(PROBLEM._replace(M=6))[1] == "dequantize"
    assert select(PROBLEM._replace(M=10))[1] == "sign_planes"
    assert select(PROBLEM._replace(M=1, accuracy=3))[1] == "dequantize"
    assert reads == [file]


def test_an_algorithm_that_cannot_take_the_problem_is_passed_over(file):
    tuned_gpu.save(file, entry([row(algorithm="bit_planes"), row(algorithm="biqgemm")]))
    choose = cuda.BACKEND.choose
    assert choose(PROBLEM) == "bit_planes"
    assert choose(PROBLEM._replace(accuracy=3)) == "biqgemm"


def test_kernels_on_another_device_do_not_follow_it(file):
    tuned_gpu.save(file, entry())
    assert chosen(PROBLEM) == "biqgemm"
    assert chosen(PROBLEM._replace(device="cpu")) == "bit_planes"
