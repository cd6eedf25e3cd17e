"""The command line: verbs, exit codes, where results and messages go."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types

import pytest
import tiny_checkpoints as tiny

import lutgemm
from lutgemm import cli
from lutgemm.cli import VERBS, main
from lutgemm.cli.quantize import options_of, parse_module
from lutgemm.config import BCQConfig, CodebookConfig
from lutgemm.errors import ArgumentError, LutgemmError

RTN = ["--bits", "2", "--group-size", "32", "--method", "rtn"]


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("cli") / "src")


@pytest.fixture
def verb(monkeypatch):
    """Replaces the verb `env` by a module whose `run` is the given function."""

    def replace(run, **attributes):
        module = types.ModuleType("lutgemm.cli.env")
        module.NAME, module.HELP, module.add_arguments, module.run = "env", "test", lambda parser: None, run
        for name, value in attributes.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, "lutgemm.cli.env", module)

    return replace


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and line in text for name, line in VERBS.items())


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_is_a_module_with_help_of_its_own(name, capsys):
    module = importlib.import_module(f"lutgemm.cli.{name}")
    assert name == module.NAME
    assert module.HELP
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: lutgemm {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["quantize"], ["quantize", "a", "b", "--bits", "x"], ["inspect", "a", "--nonsense"]]
)
def test_usage_errors_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: lutgemm" in capsys.readouterr().err


def _raiser(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LutgemmError("the file x\nis bad"), "lutgemm: error: the file x is bad\n"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), 'install it with: pip install "lutgemm[demo]"'),
        (ModuleNotFoundError("No module named 'abc_d'", name="abc_d.e"), "install it with: pip install abc_d\n"),
        (FileNotFoundError(2, "No such file or directory", "/a/b"), "lutgemm: error: /a/b: No such file or directory"),
        (MemoryError(), "ran out of memory"),
        (KeyboardInterrupt(), "lutgemm: interrupted, go on\n"),
    ],
)
def test_failures_are_one_line_and_exit_1(error, text, verb, capsys):
    verb(_raiser(error), INTERRUPTED=", go on")
    assert main(["env"]) == 1
    out, err = capsys.readouterr()
    assert text in err
    assert err.count("\n") == 1
    assert out == ""


def test_programming_errors_are_not_hidden(verb):
    verb(_raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["env"])


def test_a_verb_whose_import_fails_says_what_to_install(monkeypatch, capsys):
    def missing(name, package):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert main(["eval"]) == 1
    assert 'pip install "lutgemm[hf]"' in capsys.readouterr().err


def test_module_runs_as_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "lutgemm", "--version"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == f"lutgemm {lutgemm.__version__}\n"


def test_a_closed_pipe_is_no_traceback(src):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lutgemm", "inspect", str(src)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


def test_quantize_inspect_verify(src, tmp_path, capsys):
    dst = tmp_path / "dst"
    assert main(["quantize", str(src), str(dst), *RTN]) == 0
    out, err = capsys.readouterr()
    assert "7 layers quantized, 90.9 % of all linear weights" in out
    assert f"written to {dst}" in out
    assert "quantize: 100%" in err
    assert main(["inspect", str(dst)]) == 0
    out, err = capsys.readouterr()
    assert out.count("bcq 2 bits, group 32") == 7
    assert "coverage: 90.9 %" in out
    assert "left alone: lm_head" in out
    assert err == ""
    assert main(["verify", str(dst), str(src)]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("OK\n")
    assert "verify: 100%" in err
    tiny.rewrite(dst, lambda state: state["model.norm.weight"].add_(1))
    assert main(["verify", str(dst), str(src), "-q"]) == 1
    out, err = capsys.readouterr()
    assert "PROBLEM: tensor 'model.norm.weight' differs from SRC" in out
    assert "1 problems" in err


def test_json_goes_to_stdout_alone(src, tmp_path, capsys):
    dst = str(tmp_path / "dst")

    def result(*arguments):
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert result("quantize", str(src), "--dry-run", *RTN)["totals"]["layers"] == 7
    report = result("quantize", str(src), dst, *RTN)
    assert report["totals"]["layers"] == 7
    assert report == json.loads((tmp_path / "dst" / "report.json").read_text())
    assert len(result("inspect", dst)["layers"]) == 7
    assert result("verify", dst, str(src))["ok"]


def test_quiet_and_verbose(src, tmp_path, capsys):
    assert main(["quantize", str(src), str(tmp_path / "a"), *RTN, "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["quantize", str(src), str(tmp_path / "b"), *RTN, "-q", "-v"]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 7
    assert "model.layers.0.mlp.up_proj: 96x64, bcq 2 bits, group 32" in err


def test_dry_run_text(src, capsys):
    assert main(["quantize", str(src), "--dry-run", *RTN]) == 0
    out = capsys.readouterr().out
    assert "estimated peak memory" in out
    assert "nothing was written" in out
    assert "lm_head: 3,072 weights" in out


def test_destination_is_needed(src, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["quantize", str(src)])
    assert stop.value.code == 2
    assert "DST is missing" in capsys.readouterr().err


def parsed(*arguments):
    import argparse

    from lutgemm.cli import quantize

    parser = argparse.ArgumentParser()
    quantize.add_arguments(parser)
    return options_of(parser.parse_args(["SRC", "DST", *arguments]))


def test_options_become_a_configuration():
    assert parsed().config == BCQConfig()
    options = ["--bits", "3", "--group-size", "row", "--no-offsets", "--nested-bits", "1,2", "--scale-kind", "free"]
    expected = BCQConfig(bits=3, group_size="row", offsets=False, nested_bits=(1, 2), scale_kind="free")
    assert parsed(*options).config == expected
    assert parsed("--format", "codebook", "--vec-len", "8", "--seed", "7").config == CodebookConfig(vec_len=8, seed=7)
    assert parsed("--seed", "7").config == BCQConfig()
    options = parsed("--include", "a", "--include", "b", "--exclude", "c", "--lm-head", "--module", "x=bits:2")
    assert (options.include, options.exclude, options.lm_head) == (("a", "b"), ("c",), True)
    assert options.config_for("x1").bits == 2
    assert options.config_for("y").bits == 4


def test_settings_file_and_command_line(tmp_path):
    path = tmp_path / "settings.json"
    settings = {
        "config": {"format": "bcq", "bits": 3, "group_size": 64},
        "modules": {"down_proj": {"bits": 5}, "q_proj": {"format": "codebook", "vec_len": 8}},
        "exclude": ["k_proj"],
        "lm_head": True,
    }
    path.write_text(json.dumps(settings))
    options = parsed("--config", str(path), "--group-size", "32", "--exclude", "v_proj", "--module", "down=iters:3")
    assert options.config == BCQConfig(bits=3, group_size=32)
    assert options.config_for("down_proj") == BCQConfig(bits=5, group_size=32, iters=3)
    assert options.config_for("q_proj") == CodebookConfig(vec_len=8)
    assert options.exclude == ("k_proj", "v_proj")
    assert options.lm_head
    path.write_text(json.dumps({"config": settings["config"]}))
    assert parsed("--config", str(path), "--format", "codebook").config == CodebookConfig()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"colour": 1}', "'colour' is unknown"),
        ('{"config": []}', "'config' is unknown or of the wrong type"),
        ('{"config": {"bits": 99}}', "bits=99"),
        ('{"config": {"bits": [1]}}', "bits="),
        ('{"config": {"nested_bits": 3}}', "settings"),
        ('{"modules": {"(": {}}}', "not a regular expression"),
        ('{"modules": {"a": 1}}', "must map to an object"),
        ('{"include": [1]}', "not a regular expression"),
        ("[", "not valid JSON"),
    ],
)
def test_bad_settings_files(content, text, tmp_path, capsys):
    (tmp_path / "settings.json").write_text(content)
    assert main(["quantize", "SRC", "DST", "--config", str(tmp_path / "settings.json")]) == 1
    assert text in capsys.readouterr().err


def test_options_of_the_other_format_are_refused():
    with pytest.raises(ArgumentError, match="--vec-len does not go with --format bcq"):
        parsed("--vec-len", "4")
    with pytest.raises(ArgumentError, match="--no-offsets does not go with --format codebook"):
        parsed("--format", "codebook", "--no-offsets")


@pytest.mark.parametrize("text", ["x", "=bits:2", "x=", "x=bits", "x=bits:", "x=:2", "x=bits:2,"])
def test_bad_module_options(text):
    with pytest.raises(ArgumentError, match="--module"):
        parse_module(text)


def test_module_option():
    assert parse_module(r"layers\.\d+\.a=bits:2,group-size:row") == (
        r"layers\.\d+\.a",
        {"bits": 2, "group_size": "row"},
    )
    assert parse_module("a=b=offsets:false") == ("a=b", {"offsets": False})
