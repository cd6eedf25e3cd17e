"""The verb `lutgemm tune`."""

import json
from dataclasses import replace

import pytest
import torch
from tuned_entries import entry, put, row

import lutgemm
from lutgemm import tuning
from lutgemm.backends import cpu, tuned
from lutgemm.backends.heuristics import CPU_THRESHOLDS
from lutgemm.cli import main
from lutgemm.cli import tune as verb
from lutgemm.testing.hardware import cpu_model

needs_kernels = pytest.mark.skipif(cpu.BACKEND.unavailable() is not None, reason="no CPU kernels")


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """Where the tuned file would be, in a cache folder of the test's own, and reading switched on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.forget()
    yield tmp_path / "lutgemm" / "tuned-cpu.json"
    monkeypatch.undo()
    tuned.forget()


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(verb, "QUICK", (64, 0.1))


@needs_kernels
def test_a_quick_run(tiny, file, capsys):
    assert main(["tune", "--quick"]) == 0
    out, err = capsys.readouterr()
    assert f"written to {file}" in err
    assert out.startswith("tokens (M) up to which")
    assert cpu_model() in out
    found = tuned.find(cpu.isa(), 1)
    assert (found.size, found.lutgemm, found.torch) == (64, lutgemm.__version__, torch.__version__)
    assert tuned.rows(cpu.isa(), 1)[: len(found.rows)] == found.rows
    assert {r.op for r in found.rows} == {"bcq_linear", "codebook_linear"}
    assert any(r.integer_tables for r in found.rows) == (cpu.isa() == "avx512vbmi")
    for algorithm in ("biqgemm", "codegemm"):
        for integer in (False, True):
            tokens = [r.max_tokens for r in found.rows if (r.algorithm, r.integer_tables) == (algorithm, integer)]
            assert tokens == sorted(tokens, reverse=True)
    assert len(out.splitlines()) == 4 + len(found.rows)
    assert tuned.status(cpu.isa(), 1).startswith("tuned on ")


@needs_kernels
def test_a_dry_run_writes_nothing(tiny, file, tmp_path, capsys):
    assert main(["tune", "--quick", "--dry-run", "--json", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["written"], found["file"]) == (False, str(file))
    assert found["before"] == [tuned.row_to_json(r) for r in CPU_THRESHOLDS]
    assert tuned.entry_from_json(found["entry"], file).threads == 1
    assert "written" not in err
    assert list(tmp_path.iterdir()) == []


@needs_kernels
def test_it_says_when_results_will_not_be_used(tiny, file, capsys, monkeypatch):
    monkeypatch.setenv(tuned.VARIABLE, "0")
    assert main(["tune", "--quick"]) == 0
    assert "LUTGEMM_TUNED=0 is set" in capsys.readouterr().err
    assert file.exists()


@needs_kernels
@pytest.mark.skipif("avx2" not in cpu.available_isas(), reason="one instruction set only")
def test_other_instruction_sets_are_entries_of_their_own(tiny, file):
    with cpu.use_isa("avx2"):
        assert main(["tune", "--quick"]) == 0
    assert [(e["isa"], e["threads"]) for e in tuned.read_entries(file)] == [("avx2", 1)]
    assert not any(r.integer_tables for r in tuned.find("avx2", 1).rows)


def test_reset(file, capsys):
    assert main(["tune", "--reset"]) == 0
    assert capsys.readouterr().out == f"nothing to remove from {file}\n"
    tuned.save(file, entry())
    assert main(["tune", "--reset", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"1 entry would be removed from {file}\n"
    assert file.exists()
    assert main(["tune", "--reset", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(file), "removed": 1, "dry_run": False}
    assert not file.exists()


@pytest.mark.parametrize("threads", ["0", "100000"])
def test_senseless_threads_are_refused(threads, capsys):
    assert main(["tune", "--quick", "--threads", threads]) == 1
    assert f"threads={threads} is not supported" in capsys.readouterr().err


def test_without_kernels_or_a_home_it_says_so(file, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(tuned, "cache_file", lambda: None)
        assert main(["tune", "--quick"]) == 1
    assert "set XDG_CACHE_HOME" in capsys.readouterr().err
    monkeypatch.setattr(cpu, "BACKEND", replace(cpu.BACKEND, unavailable=lambda: "no wings"))
    assert main(["tune", "--quick"]) == 1
    assert "the CPU backend cannot run: no wings" in capsys.readouterr().err


@needs_kernels
def test_a_slow_machine_gets_smaller_weights(monkeypatch):
    monkeypatch.setattr(tuning, "_seconds_of_a_round", lambda size: (size / 4096) ** 2)
    assert tuning.fitting_size(4096, 100) == 4096
    assert tuning.fitting_size(4096, 6) == 2048
    assert tuning.fitting_size(4096, 1e-9) == tuning.MIN_SIZE
    assert tuning.fitting_size(64, 1e-9) == 64


def test_what_before_means():
    like = row("bcq_linear", "biqgemm", 5)
    assert verb.tokens_before(CPU_THRESHOLDS, like) == verb.tokens_before(CPU_THRESHOLDS, row(cost=6))
    assert verb.tokens_before([], like) == (0, 0)


@needs_kernels
def test_env_shows_which_thresholds_are_used(file, capsys):
    tuned.save(file, entry(isa=cpu.isa()))
    assert main(["env"]) == 0
    assert f"thresholds   tuned on 2026-01-02 with torch 2.13.0 ({file})" in capsys.readouterr().out
    put(file, b"")
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cpu"]["thresholds"].startswith(f"built in: {file}")
