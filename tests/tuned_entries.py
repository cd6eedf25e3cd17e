"""Entries of the file that `lutgemm tune` writes, made up."""

import json
from pathlib import Path

import lutgemm
from lutgemm.backends import tuned
from lutgemm.backends.heuristics import Threshold
from lutgemm.testing.hardware import cpu_model


def row(op="bcq_linear", algorithm="biqgemm", cost=8.0, tokens=7, narrow=6, integer=False):
    return Threshold(op, algorithm, cost, tokens, narrow, integer, "here", "2026-01-02")


def entry(rows=None, **changes):
    head = {"cpu": cpu_model(), "isa": "avx2", "threads": 1, "lutgemm": lutgemm.__version__, "torch": "2.13.0"}
    fields = head | {"date": "2026-01-02", "size": 64, "rows": tuple([row()] if rows is None else rows)} | changes
    return tuned.Entry(**fields)


def put(file: Path, content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def document(*entries):
    return {"format": tuned.FORMAT, "version": tuned.FORMAT_VERSION, "entries": list(entries)}
