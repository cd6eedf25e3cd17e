"""An interrupt of the command while torch is being imported is one line; a program's own handling of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lutgemm

SCRIPT = "import sys\nfrom lutgemm.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
"""What an installer writes for the console script."""

SLOW_TORCH = "import sys, time\nprint('importing', flush=True)\ntime.sleep(60)\n"


def start(arguments: list[str], folder: Path, fake_torch: str) -> subprocess.Popen[str]:
    """Python with `arguments`, where `import torch` runs the text `fake_torch` and lutgemm is the one tested here."""
    (folder / "fake" / "torch").mkdir(parents=True)
    (folder / "fake" / "torch" / "__init__.py").write_text(fake_torch, "utf-8")
    path = os.pathsep.join((str(folder / "fake"), str(Path(lutgemm.__file__).parent.parent)))
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, stderr) of a process that got SIGINT once it had said that it imports."""
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


@pytest.mark.parametrize("form", ["console script", "python -m"])
def test_an_interrupt_of_the_command_during_the_import_of_torch_is_one_line(form: str, tmp_path: Path) -> None:
    script = tmp_path / "bin" / "lutgemm"
    script.parent.mkdir()
    script.write_text(SCRIPT, "utf-8")
    arguments = [str(script)] if form == "console script" else ["-m", "lutgemm"]
    assert interrupted(start([*arguments, "env"], tmp_path, SLOW_TORCH)) == (1, "lutgemm: interrupted\n")


@pytest.mark.parametrize("form", ["script", "-c", "python -m"])
def test_a_program_that_imports_lutgemm_gets_its_keyboard_interrupt(form: str, tmp_path: Path) -> None:
    program = "try:\n    import lutgemm\nexcept KeyboardInterrupt:\n    print('mine', file=__import__('sys').stderr)\n"
    (tmp_path / "program.py").write_text(program, "utf-8")
    arguments = {"script": ["program.py"], "-c": ["-c", program], "python -m": ["-m", "program"]}[form]
    assert interrupted(start(arguments, tmp_path, SLOW_TORCH)) == (0, "mine\n")


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    """As under nohup, or for a job that a shell script puts in the background."""
    seen = "import signal, sys\nprint(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)\nsys.exit(3)\n"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start(["-m", "lutgemm", "env"], tmp_path, seen)
    finally:
        signal.signal(signal.SIGINT, before)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (3, "True\n")


def test_once_main_runs_an_interrupt_is_a_keyboard_interrupt(tmp_path: Path) -> None:
    """Then `main` reports it, with what the verb says on resuming."""
    code = (
        "import os, signal, sys\n"
        "sys.argv = ['lutgemm', 'env']\n"
        "from lutgemm import cli, _startup\n"
        "assert signal.getsignal(signal.SIGINT) is _startup._leave\n"
        "def run(*args): assert signal.getsignal(signal.SIGINT) is signal.default_int_handler; return 7\n"
        "cli._run = run\n"
        "sys.exit(cli.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")


def test_the_module_imported_first_imports_nothing_slow() -> None:
    """By its file, so that the package around it is not imported."""
    code = (
        "import sys, importlib.util as u\n"
        "before = set(sys.modules)\n"
        f"spec = u.spec_from_file_location('startup', {lutgemm._startup.__file__!r})\n"
        "spec.loader.exec_module(u.module_from_spec(spec))\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) < 15, done.stdout
