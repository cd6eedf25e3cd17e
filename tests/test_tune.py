"""Tuned thresholds: the arithmetic of crossings, the file that holds them, and when it is obeyed."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tuned_entries import document, entry, put, row

import lutgemm
from lutgemm import tuning
from lutgemm.backends import Problem, cpu, select, tuned
from lutgemm.backends.heuristics import CPU_THRESHOLDS, NO_CROSSING, choose_on_cpu
from lutgemm.errors import BackendError, CheckpointError
from lutgemm.testing.hardware import cpu_model, cpu_name

needs_kernels = pytest.mark.skipif(cpu.BACKEND.unavailable() is not None, reason="no CPU kernels")

PROBLEM = Problem("bcq_linear", "cpu", torch.float32, 5, 64, 64, 32, 4, "free")


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """Where the tuned file would be, in a cache folder of the test's own, and reading switched on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.forget()
    yield tmp_path / "lutgemm" / "tuned-cpu.json"
    monkeypatch.undo()
    tuned.forget()


# arithmetic


def line(start, slope, tokens=(16, 48, 128)):
    return {m: start + slope * m for m in tokens}


def test_a_line_is_found_again():
    assert tuning.fit_line(line(3.0, 0.25)) == pytest.approx((3.0, 0.25))


@pytest.mark.parametrize("unit", [1.0, 1e4])
@pytest.mark.parametrize(
    ("look_up", "dense", "tokens"),
    [
        ((10, 3), (110, 1), 50),
        ((10, 3), (111, 1), 50),
        ((0, 2), (10, 1), 10),
        ((10, 1), (20, 1), NO_CROSSING),
        ((10, 1), (20, 2), NO_CROSSING),
        ((30, 1), (20, 1), 0),
        ((30, 1), (20, 2), NO_CROSSING),
        ((500, 1), (20, 2), 0),
        ((30, 2), (20, 1), 0),
        ((0, 1.001), (100, 1), NO_CROSSING),
        ((0, 1.025), (100, 1), 4000),
    ],
)
def test_crossings(look_up, dense, tokens, unit):
    def times(line_):
        return line(line_[0] * unit, line_[1] * unit)

    assert tuning.crossing(times(look_up), times(dense)) == pytest.approx(tokens, abs=1)


def test_the_last_win_ends_at_the_first_loss():
    assert tuning.last_win({1: 0.5, 2: 0.9, 3: 1.1, 4: 0.5}) == 2
    assert tuning.last_win({2: 0.9, 1: 1.0}) == 0
    assert tuning.last_win({4: 0.9, 1: 0.2}) == 4


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([30, 20, 10], [30, 20, 10]),
        ([5, 10, 20], [10, 10, 10]),
        ([100, 20, 45, 10], [100, 30, 30, 10]),
        ([NO_CROSSING, NO_CROSSING, 7], [NO_CROSSING, NO_CROSSING, 7]),
        ([0, 0], [0, 0]),
        ([], []),
    ],
)
def test_thresholds_never_rise_with_cost(tokens, expected):
    assert tuning.falling(tokens) == expected


def made_up_times(cost, integer_too):
    """Lines for every algorithm; `dequantize` starts at 100 us, in bf16 at 50, integer tables are 4 times as fast."""
    times = {}
    for dtype in tuning.DTYPES:
        for integer in (False, True)[: 1 + integer_too]:
            speed = 4 if integer else 1
            for m in tuning.FEW_TOKENS:
                times[tuning.Timed("lut_gemm", integer, dtype, m)] = (0.1 + m) * cost / speed
            for m in tuning.FEW_TOKENS + tuning.MANY_TOKENS:
                for name in ("biqgemm", "codegemm"):
                    times[tuning.Timed(name, integer, dtype, m)] = (2.5 + m / 5) * cost / speed
        for m in tuning.MANY_TOKENS:
            times[tuning.Timed("dequantize", False, dtype, m)] = (100 if dtype == torch.float32 else 50) + m / 10
    return times


def test_rows_of_made_up_times():
    studies = []
    for case in reversed(tuning.cases(256)):
        cost = case.bits if case.op == "bcq_linear" else 8 * case.num_codebooks / case.vec_len
        studies.append(tuning.Study(case, cost, made_up_times(cost, case.op == "bcq_linear")))
    rows = tuning.thresholds(studies, "here", "2026-01-02")
    assert {(r.device, r.date) for r in rows} == {("here", "2026-01-02")}
    found = {(r.algorithm, r.integer_tables, r.max_cost): (r.max_tokens, r.max_tokens_bf16) for r in rows}
    assert found["lut_gemm", False, 8] == found["lut_gemm", True, 8] == (2, 2)
    # 2.5 c + c m / 5 = 100 + m / 10
    for cost, tokens in ((2, 316), (4, 128), (8, 53)):
        assert found["biqgemm", False, cost][0] == pytest.approx(tokens, abs=1)
    assert found["codegemm", False, 16] == pytest.approx((19, 3), abs=1)
    assert found["biqgemm", True, 1] == (NO_CROSSING, NO_CROSSING)
    assert [r.max_cost for r in rows if r.algorithm == "biqgemm"] == 2 * list(tuning.BITS)
    assert choose_on_cpu(PROBLEM._replace(M=2), rows=rows) == "lut_gemm"
    assert choose_on_cpu(PROBLEM._replace(M=127), rows=rows) == "biqgemm"
    assert choose_on_cpu(PROBLEM._replace(M=130), rows=rows) == "dequantize"


# the file


def test_an_entry_comes_back_as_it_was_written(file):
    rows = [row(), row("codebook_linear", "codegemm", 2.5, NO_CROSSING, 0), row(integer=True)]
    tuned.save(file, entry(rows))
    found = tuned.find("avx2", 1)
    where = tuned.where_measured(cpu_model(), "avx2", 1, 64)
    assert found == entry([replace(r, device=where) for r in rows])
    assert json.loads(file.read_bytes())["entries"][0]["rows"][1]["max_tokens"] is None


def test_tuned_rows_replace_built_in_ones_of_their_kind(file):
    tuned.save(file, entry([row(cost=8, tokens=9)]))
    rows = tuned.rows("avx2", 1)
    assert choose_on_cpu(PROBLEM._replace(M=1), rows=rows) == "biqgemm"
    assert choose_on_cpu(PROBLEM._replace(M=10), rows=rows) == "dequantize"
    others = [r for r in CPU_THRESHOLDS if r.op != "bcq_linear" or r.integer_tables]
    assert list(rows[1:]) == others


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"isa": "avx512"}, {"threads": 2}, {"lutgemm": "0.0.1"}])
def test_an_entry_of_another_machine_is_passed_over_in_silence(change, file):
    tuned.save(file, entry(**change))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.rows("avx2", 1) is CPU_THRESHOLDS


def test_entries_are_kept_side_by_side(file):
    tuned.save(file, entry())
    tuned.save(file, entry(threads=2))
    tuned.save(file, entry(cpu="another", rows=[]))
    tuned.save(file, entry([row(tokens=99)]))
    assert [(e["cpu"], e["threads"]) for e in tuned.read_entries(file)] == [
        (cpu_model(), 2),
        ("another", 1),
        (cpu_model(), 1),
    ]
    assert tuned.rows("avx2", 1)[0].max_tokens == 99
    assert tuned.reset(file, cpu_model(), dry_run=True) == 2
    assert tuned.reset(file, cpu_model()) == 2
    assert [e["cpu"] for e in tuned.read_entries(file)] == ["another"]
    assert tuned.reset(file, cpu_model()) == 0
    assert tuned.reset(file, "another") == 1
    assert not file.exists()


def test_the_file_does_not_grow_without_end(file):
    for number in range(tuned.MAX_ENTRIES + 3):
        tuned.save(file, entry([], cpu=f"cpu {number}"))
    names = [e["cpu"] for e in tuned.read_entries(file)]
    assert names == [f"cpu {number}" for number in range(3, tuned.MAX_ENTRIES + 3)]


GOOD = entry().to_json()
BAD_ROWS = [
    {"op": "softmax"},
    {"op": ["bcq_linear"]},
    {"algorithm": "codegemm"},
    {"algorithm": None},
    {"max_cost": 0},
    {"max_cost": "8"},
    {"max_cost": True},
    {"max_tokens": -1},
    {"max_tokens": 1.5},
    {"max_tokens": True},
    {"max_tokens_bf16": 2**63},
    {"integer_tables": 1},
    {"more": 1},
]
DAMAGED = {
    "empty": b"",
    "cut": json.dumps(document(GOOD)).encode()[:-9],
    "not text": b"\xff\xfe\x00",
    "a list": [],
    "nothing": {},
    "another format": document() | {"format": "other"},
    "a later version": document() | {"version": 2},
    "a version that equals 1": document() | {"version": True},
    "entries of numbers": document() | {"entries": [1]},
    "entries as an object": document() | {"entries": {}},
    "deep": b"[" * 100_000,
    "huge": b" " * (tuned.FILE_LIMIT + 1),
    "infinite": json.dumps(document(GOOD)).replace("8.0", "1e999").encode(),
    "nan": json.dumps(document(GOOD)).replace("8.0", "NaN").encode(),
    "key twice": json.dumps(document(GOOD)).replace('"size"', '"date"').encode(),
    "no date": document({k: v for k, v in GOOD.items() if k != "date"}),
    "date that moves the cursor": document(GOOD | {"date": "\x1b[2J"}),
    "long torch": document(GOOD | {"torch": "2" * 1000}),
    "no rows": document(GOOD | {"rows": None}),
    "row that is none": document(GOOD | {"rows": [7]}),
    "too many rows": document(GOOD | {"rows": GOOD["rows"] * 1000}),
    "no size": document(GOOD | {"size": 0}),
    **{f"row {change}": document(GOOD | {"rows": [GOOD["rows"][0] | change]}) for change in BAD_ROWS},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_file_is_ignored_with_one_warning(content, file):
    put(file, content)
    with pytest.warns(RuntimeWarning, match="tuned thresholds are not used") as caught:
        assert tuned.rows("avx2", 1) is CPU_THRESHOLDS
    assert tuned.rows("avx2", 1) is CPU_THRESHOLDS
    assert len(caught) == 1
    text = str(caught[0].message)
    assert str(file) in text
    assert "run `lutgemm tune` again, or delete the file" in text
    assert len(text) < 1000
    assert text.isprintable()


def test_a_damaged_file_warns_once_for_all_numbers_of_threads(file):
    put(file, b"")
    with pytest.warns(RuntimeWarning) as caught:
        assert all(tuned.rows("avx2", threads) is CPU_THRESHOLDS for threads in (1, 2, 3))
    assert len(caught) == 1


def test_a_damaged_file_is_replaced_and_removed(file):
    put(file, b"{")
    tuned.save(file, entry())
    assert tuned.find("avx2", 1).threads == 1
    put(file, b"{")
    assert tuned.reset(file, cpu_model(), dry_run=True) == 1
    assert file.exists()
    assert tuned.reset(file, cpu_model()) == 1
    assert not file.exists()


def test_what_is_no_file_is_ignored(file):
    file.mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="tuned thresholds are not used"):
        assert tuned.rows("avx2", 1) is CPU_THRESHOLDS
    with pytest.raises(CheckpointError, match="cannot be written"):
        tuned.save(file, entry())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_does_not_hang(file):
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    with pytest.warns(RuntimeWarning, match="tuned thresholds are not used"):
        assert tuned.rows("avx2", 1) is CPU_THRESHOLDS


def test_a_bad_entry_of_another_machine_does_no_harm(file):
    put(file, document({"cpu": "another", "rows": 3}, GOOD))
    assert tuned.rows("avx2", 1)[0].max_tokens == 7


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "lutgemm").write_text("a file")
    with pytest.raises(CheckpointError, match=r"tuned-cpu.json: cannot be written: .*XDG_CACHE_HOME"):
        tuned.save(tuned.cache_file(), entry())


def test_where_the_file_is(tmp_path, monkeypatch):
    assert tuned.cache_file() == tmp_path / "lutgemm" / "tuned-cpu.json"
    monkeypatch.setenv("HOME", "/home/someone")
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert tuned.cache_file() == Path("/home/someone/.cache/lutgemm/tuned-cpu.json")

    def no_home():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    assert tuned.cache_file() is None
    assert tuned.rows("avx2", 1) is CPU_THRESHOLDS
    assert "lutgemm tune" in tuned.status("avx2", 1)


def test_the_variable_switches_it_off(file, monkeypatch):
    put(file, b"damaged")
    monkeypatch.setenv(tuned.VARIABLE, "0")
    assert tuned.rows("avx2", 1) is CPU_THRESHOLDS
    assert tuned.status("avx2", 1) == "built in (LUTGEMM_TUNED=0)"
    tuned.save(file, entry())
    monkeypatch.setenv(tuned.VARIABLE, "1")
    tuned.forget()
    assert tuned.rows("avx2", 1)[0].max_tokens == 7
    monkeypatch.setenv(tuned.VARIABLE, "no")
    tuned.forget()
    with pytest.raises(BackendError, match="LUTGEMM_TUNED='no' is unknown; use 0"):
        tuned.rows("avx2", 1)
    assert "LUTGEMM_TUNED='no' is unknown" in tuned.status("avx2", 1)


def test_status(file):
    assert tuned.status("avx2", 2) == "built in; `lutgemm tune` measures this machine with 2 threads"
    tuned.save(file, entry(lutgemm="0.0.1"))
    assert "are for lutgemm 0.0.1; run `lutgemm tune` again" in tuned.status("avx2", 1)
    tuned.save(file, entry())
    assert tuned.status("avx2", 1) == f"tuned on 2026-01-02 with torch 2.13.0 ({file})"
    put(file, b"")
    assert str(file) in tuned.status("avx2", 1)


# calls


@needs_kernels
def test_calls_follow_the_file_and_read_it_once(file, monkeypatch):
    problem = PROBLEM._replace(accuracy=3)
    assert select(problem)[1] == "biqgemm"
    tuned.save(file, entry([row(algorithm="lut_gemm", tokens=5)], isa=cpu.isa()))
    assert select(problem)[1] == "biqgemm"
    tuned.forget()
    reads = []
    monkeypatch.setattr(tuned, "read_entries", lambda path, read=tuned.read_entries: reads.append(path) or read(path))
    assert select(problem)[1] == "lut_gemm"
    assert select(problem._replace(M=6))[1] == "dequantize"
    assert select(problem._replace(M=4))[1] == "lut_gemm"
    assert reads == [file]


@needs_kernels
@pytest.mark.parametrize("isa", cpu.available_isas())
def test_kernels_of_integer_tables_have_rows_of_their_own(isa):
    books = PROBLEM._replace(op="codebook_linear", planes=4, vec_len=4, codebook_bits=8, M=50)
    with cpu.use_isa(isa):
        vbmi = isa == "avx512vbmi"
        planes = {"avx512": (True, True, False, False), "avx512vbmi": (True, True, True, False)}.get(isa, (False,) * 4)
        assert tuple(cpu.integer_tables(PROBLEM._replace(accuracy=a)) for a in range(4)) == planes
        assert tuple(cpu.integer_tables(books._replace(accuracy=a)) for a in range(4)) == (vbmi, vbmi, vbmi, False)
        assert not cpu.integer_tables(books._replace(codebook_bits=9, accuracy=1))
        assert cpu.BACKEND.choose(books) == "dequantize"
        assert cpu.BACKEND.choose(books._replace(accuracy=1)) == ("codegemm" if vbmi else "dequantize")


@needs_kernels
def test_a_damaged_file_does_not_stop_a_call(file):
    put(file, b"\x00")
    with pytest.warns(RuntimeWarning, match="tuned thresholds are not used"):
        assert select(PROBLEM)[1] == choose_on_cpu(PROBLEM, cpu.integer_tables(PROBLEM))


def test_importing_lutgemm_reads_nothing(file, tmp_path):
    put(file, b"damaged")
    code = "import warnings; warnings.simplefilter('error'); import lutgemm"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=Path(lutgemm.__file__).parents[1])


def test_the_model_of_the_processor_names_it():
    assert cpu_model().startswith(cpu_name())
