"""What tests of `lutgemm tune --device cuda` share: a made-up GPU, entries of its file, and where the file is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lutgemm
from lutgemm.backends import Problem, tuned_file, tuned_gpu
from lutgemm.backends.gpu_heuristics import GpuThreshold, choose_on_gpu
from lutgemm.backends.gpu_layouts import algorithms
from lutgemm.backends.tuned_gpu import Gpu

GPU = Gpu("Some GPU", "9.0", 132)
PROBLEM = Problem("bcq_linear", "cuda", torch.float16, 5, 4096, 4096, 128, 3, "free", accuracy=1)
OFFERED = {op: tuple(name for of, name in algorithms() if of == op) for op in ("bcq_linear", "codebook_linear")}
OTHERS = [{"gpu": GPU._replace(name="Other")}, {"gpu": GPU._replace(capability="8.0")}]
OTHERS += [{"gpu": GPU._replace(multiprocessors=114)}, {"lutgemm": "0.0.1"}]


def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the tuned file would be, in a cache folder of the test's own; one GPU is seen, reading is switched on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuned_file.VARIABLE, raising=False)
    monkeypatch.setattr(tuned_gpu, "kinds", lambda: [GPU])
    tuned_gpu.forget()
    yield tmp_path / "lutgemm" / "tuned-cuda.json"
    monkeypatch.undo()
    tuned_gpu.forget()


def takes_all(problem, algorithm):
    return None


def chosen(problem, rows=None):
    return choose_on_gpu(problem, OFFERED[problem.op], takes_all, rows)


def row(op="bcq_linear", algorithm="biqgemm", tokens=9, **limits):
    return GpuThreshold(op, algorithm, tokens, str(GPU), "2026-01-02", **limits)


def entry(rows=None, **changes):
    fields = {"gpu": GPU, "lutgemm": lutgemm.__version__, "torch": "2.13.0", "date": "2026-01-02"}
    return tuned_gpu.Entry(**fields | {"rows": tuple([row()] if rows is None else rows)} | changes)


def document(*entries):
    return {"format": tuned_gpu.FILE.format, "version": tuned_gpu.FILE.version, "entries": list(entries)}
