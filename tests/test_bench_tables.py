"""What `lutgemm bench` makes of records: the table, the drawing, the page, the file."""

import json
import sys

import pytest
from bench_runs import TINY, few_copies

from lutgemm.bench import machine, plot, readme, report, runner
from lutgemm.bench.records import BaselineRecord, Record
from lutgemm.cli import main
from lutgemm.errors import ArgumentError, CheckpointError
from lutgemm.testing import timing
from lutgemm.testing.cases import OpCase

small_memory = pytest.fixture(autouse=True)(few_copies)


def timed(name: str, us: float, m: int = 1, **changes) -> Record | BaselineRecord:
    """A record of a made-up time."""
    t = timing.Timing(us, us, us, 5)
    if name != "lutgemm":
        return BaselineRecord(name, m, 64, 128, "cpu", 1, "cold", "", 16, 16384, 0.0, 1.0, t)
    case = OpCase(M=m, N=64, K=128, **changes)
    return Record(case, "lut_gemm", "cpu", "avx2", "cpu", 1, "cold", case.bits, 4096, 0.0, True, "", t)


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


def test_a_saved_run_can_be_read_by_others(tmp_path):
    path = tmp_path / "run.json"
    report.write_json(path, {}, [])
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_wrong_time_cannot_be_written_over_an_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("old")
    monkeypatch.setattr(report, "dumps", lambda header, records: "new")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(CheckpointError, match="disk is full"):
        report.write_json(path, {}, [])
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
