"""Every command and every Python block of README.md, run."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from test_eval import TEXT, char_tokenizer, tiny_llama

from lutgemm import cli
from lutgemm.bench import readme

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else ""
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines() if line.strip()]

pytestmark = pytest.mark.skipif(not README, reason="README.md lies in the source tree only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model SRC and a text TEXT, as the README calls them."""
    path = tmp_path_factory.mktemp("readme")
    model = tiny_llama(max_position_embeddings=1024)
    model.save_pretrained(path / "SRC")
    char_tokenizer().save_pretrained(path / "SRC")
    (path / "TEXT").write_text(TEXT * 4, encoding="utf-8")
    return path


def commands(program: str) -> list[str]:
    return [line.partition("#")[0].strip() for line in SHELL if line.split()[0] == program]


def test_every_shell_line_is_covered_here():
    assert {line.split()[0] for line in SHELL} <= {"make", "pip", "lutgemm"}
    assert commands("pip") == ["pip install ."]  # run by test_packaging.py, which builds and installs the wheel


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", commands("make"))
def test_make_targets_exist(command, tmp_path):
    """What they run is this test-suite and `lutgemm demo`; here only that make knows how to reach them."""
    plan = subprocess.run(
        [*shlex.split(command), "--dry-run", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert plan.returncode == 0, plan.stderr
    assert {"make test": "pytest", "make demo": "lutgemm"}[command] in plan.stdout


def test_tables_are_those_of_the_committed_runs():
    assert len(readme.MARKED.findall(README)) == 2
    results = ROOT / "bench" / "results"
    assert readme.update(README, results) == README
    whole = (results / "README.md").read_text("utf-8")
    assert len(readme.MARKED.findall(whole)) == 1
    assert readme.update(whole, results) == whole


def test_lutgemm_commands_and_python_blocks(folder, monkeypatch, capsys):
    """In the order of the page, in one folder, as a reader would."""
    monkeypatch.chdir(folder)
    lines = commands("lutgemm")
    assert [line.split()[1] for line in lines][:3] == ["quantize", "inspect", "verify"]
    for line in lines:
        code = cli.main(shlex.split(line)[1:])
        printed = capsys.readouterr()
        assert code == 0, f"{line}: {printed.err}"
        assert printed.out.strip(), line
    assert len(PYTHON) >= 3
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "bits per weight" in capsys.readouterr().out
