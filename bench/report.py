"""How a run is shown and kept: a header, a table, a JSON file, a plot."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lutgemm.errors import ArgumentError

from .runner import Record

BUSY_LOAD = 0.5
"""Load per core, before the run, from which other processes surely disturb it."""
BUSY = (
    "NOTE: {load:.1f} processes wanted the {cores} cores before this run. Long calls are interrupted more than short "
    "ones, so medians flatter the short; compare the 10th percentiles (p10), or measure again on an idle machine."
)

COLUMNS = (
    "case",
    "algorithm",
    "on",
    "thr",
    "mode",
    "us",
    "p10-p90",
    "GB/s",
    "%read",
    "x fp32",
    "x bf16",
    "error",
    "ok",
)


def dumps(header: dict[str, Any], records: Sequence[Record]) -> str:
    """The whole run as JSON text: `{"header": ..., "records": [...]}`."""
    return json.dumps({"header": header, "records": [record.to_dict() for record in records]}, indent=1)


def write_json(path: Path, header: dict[str, Any], records: Sequence[Record]) -> None:
    """Write `dumps` under a temporary name, flush it, then rename it to `path`."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(dumps(header, records) + "\n")
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def describe(record: Record) -> str:
    """The case in a few characters: shape, bits, group size."""
    c = record.case
    kind = f"{c.bits}-bit" if c.op == "bcq_linear" else f"{c.num_codebooks}x{c.vec_len}x{c.codebook_bits}"
    kind += "" if c.scale_kind == "free" else f" {c.scale_kind}"
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[c.dtype]
    return f"M={c.M} {c.N}x{c.K} {kind} g{c.layout.group_size} {short}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _row(record: Record) -> tuple[str, ...]:
    t = record.timing
    where = record.isa or record.backend
    return (
        describe(record),
        record.algorithm,
        where if record.device == "cpu" else f"{where} {record.device}",
        str(record.threads),
        record.mode,
        _number(None if t is None else t.median_us, ".1f"),
        "-" if t is None else f"{t.p10_us:.1f}-{t.p90_us:.1f}",
        _number(record.gb_per_s, ".1f"),
        _number(record.bandwidth_percent, ".0f"),
        _number(record.speedup("torch_fp32"), ".1f"),
        _number(record.speedup("torch_bf16"), ".1f"),
        f"{record.error:.1e}",
        "yes" if record.correct else "WRONG",
    )


def _baseline_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The baselines of a group of records that were timed together."""
    rows = []
    for name, t in records[0].baselines.items():
        cells = dict.fromkeys(COLUMNS, "")
        cells |= {"case": describe(records[0]), "algorithm": name, "on": "torch", "thr": str(records[0].threads)}
        cells |= {"mode": records[0].mode, "us": f"{t.median_us:.1f}", "p10-p90": f"{t.p10_us:.1f}-{t.p90_us:.1f}"}
        rows.append(tuple(cells.values()))
    return rows


def table(records: Sequence[Record]) -> str:
    """A plain-text table: the records, and after each group of one case the baselines that ran beside it."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        groups.setdefault((r.case, r.threads, r.mode, r.backend, r.isa), []).append(r)
    rows = [row for group in groups.values() for row in [*map(_row, group), *_baseline_rows(group)]]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (COLUMNS, *rows)]
    notes = [f"WRONG {r.algorithm} {describe(r)}: {r.message}" for r in records if not r.correct]
    return "\n".join([*lines, *dict.fromkeys(notes)])


def header_text(header: dict[str, Any], records: Sequence[Record]) -> str:
    """The header as lines of text."""
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in header["caches"].items()) or "unknown caches"
    commit = (
        f"{header['commit'][:12]}{' (changed)' if header['dirty'] else ''}" if header["commit"] else "not a checkout"
    )
    read = {r.threads: r.read_gb_per_s for r in records if r.read_gb_per_s}
    measured = ", ".join(f"{gb:.1f} GB/s with {t} thread{'s' * (t > 1)}" for t, gb in read.items())
    lines = [
        f"{header['cpu']}, {header['cores']} cores, {caches}" + (f"; {header['gpu']}" if header["gpu"] else ""),
        f"torch {header['torch']}, lutgemm {header['lutgemm']} ({commit}), python {header['python']}, {header['date']}",
        f"memory is read at {measured}" if measured else "",
        BUSY.format(**header) if header["load"] and header["load"] > BUSY_LOAD * header["cores"] else "",
        f"$ {header['command']}",
    ]
    return "\n".join(line for line in lines if line)


def save_plot(path: Path, header: dict[str, Any], records: Sequence[Record]) -> None:
    """A PNG of the median times beside the baselines. Raises `ArgumentError` without matplotlib or without times."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError(f"plot: {error}; install it with: pip install 'lutgemm[bench]'") from None
    timed = [record for record in records if record.timing is not None]
    if not timed:
        raise ArgumentError("plot: no correct result was timed, so there is nothing to draw")
    bars: dict[str, float] = {}
    for record in timed:
        assert record.timing is not None
        suffix = f"{describe(record)}, {record.mode}, {record.threads} thr"
        bars[f"{record.algorithm} {record.isa or record.backend}\n{suffix}"] = record.timing.median_us
        for name, t in record.baselines.items():
            bars.setdefault(f"{name}\n{suffix}", t.median_us)
    figure = Figure(figsize=(9, 1 + 0.45 * len(bars)), layout="constrained")
    axes = figure.subplots()
    colors = ["tab:gray" if label.startswith("torch_") else "tab:blue" for label in bars]
    drawn = axes.barh(list(bars), list(bars.values()), color=colors)
    axes.bar_label(drawn, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("median time of a call, microseconds (log scale)")
    axes.set_title(f"{header['cpu']}, torch {header['torch']}", fontsize=9)
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, format="png", dpi=120)
