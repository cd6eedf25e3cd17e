"""How a run is shown and kept: a header, a table, a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lutgemm.checkpoint.atomic import write_file

from .baselines import BASELINES
from .goals import goals, text
from .records import Bandwidth, BaselineRecord, Record
from .runner import baselines_of

BUSY_LOAD = 0.5
"""Load per core, before the run, from which other processes surely disturb it."""
BUSY = (
    "NOTE: {load:.1f} processes wanted the {cores} cores before this run. Long calls are interrupted more than short "
    "ones, so medians flatter the short; compare the 10th percentiles (p10), or measure again on an idle machine."
)

COLUMNS = (
    "case",
    "algorithm",
    "accuracy",
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
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def _measured(value: Any) -> Any:
    """`value` with every float in it cut to 9 digits, more than a measurement has."""
    if isinstance(value, dict):
        return {key: _measured(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_measured(inner) for inner in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def compact(run: dict[str, Any]) -> str:
    """JSON text of a run with one line to a record: files of hundreds of records are committed, and compared."""
    parts = [f'"header": {json.dumps(run["header"])}']
    for name in ("records", "baselines"):
        lines = ",\n".join(json.dumps(_measured(record)) for record in run[name])
        parts.append(f'"{name}": [\n{lines}\n]')
    return "{" + ",\n".join(parts) + "}"


def dumps(header: dict[str, Any], records: Sequence[Record]) -> str:
    """The whole run as JSON text: `{"header": ..., "records": [...], "baselines": [...]}`."""
    ours = [record.to_dict() for record in records]
    beside = [record.to_dict() for record in baselines_of(records)]
    return compact({"header": header, "records": ours, "baselines": beside})


def write_json(path: Path, header: dict[str, Any], records: Sequence[Record]) -> None:
    """Write `dumps` to `path`, whole or not at all."""
    write_file(path, f"{dumps(header, records)}\n".encode())


def describe(record: Record) -> str:
    """The case in a few characters: shape, bits, group size."""
    c = record.case
    return f"M={c.M} {c.N}x{c.K} {record.weights} g{c.layout.group_size} {DTYPES[c.dtype]}"


def number(value: float | None, form: str) -> str:
    """The formatted value, or "-" for None."""
    return "-" if value is None else format(value, form)


def _cells(record: Record | BaselineRecord) -> tuple[str, ...]:
    """The columns that both kinds of record have: thr to %read."""
    t = record.timing
    rates = record.to_dict()
    return (
        str(record.threads),
        record.mode,
        number(None if t is None else t.median_us, ".1f"),
        "-" if t is None else f"{t.p10_us:.1f}-{t.p90_us:.1f}",
        number(rates["gb_per_s"], ".1f"),
        number(rates["bandwidth_percent"], ".0f"),
    )


def _row(record: Record) -> tuple[str, ...]:
    where = record.isa or record.backend
    return (
        describe(record),
        record.algorithm,
        record.case.accuracy,
        where if record.device == "cpu" else f"{where} {record.device}",
        *_cells(record),
        number(record.speedup("torch_fp32"), ".1f"),
        number(record.speedup("torch_bf16"), ".1f"),
        number(record.error, ".1e"),
        "yes" if record.correct else "WRONG",
    )


def _baseline_row(b: BaselineRecord) -> tuple[str, ...]:
    shape = f"M={b.M} {b.N}x{b.K} {b.bits_per_weight:.3g}-bit"
    good = "yes" if b.correct else "WRONG"
    return (shape, b.name, "", BASELINES[b.name].label.split()[0], *_cells(b), "", "", number(b.error, ".1e"), good)


def table(records: Sequence[Record], header: dict[str, Any] | None = None) -> str:
    """A plain-text table: the records, and after those that were timed together the baselines that ran beside them;
    last, of what was measured on a GPU, the figures asked for and found. header: whose GPU they are asked of.
    """
    groups: dict[tuple[int, ...], list[Record]] = {}
    for r in records:
        groups.setdefault(tuple(map(id, r.baselines)) or (id(r),), []).append(r)
    rows: list[tuple[str, ...]] = []
    for group in groups.values():
        rows += [*map(_row, group), *(_baseline_row(b) for b in group[0].baselines if not b.absent)]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (COLUMNS, *rows)]
    notes = [f"WRONG {r.algorithm} {describe(r)}: {r.message}" for r in records if not r.correct]
    for b in baselines_of(records):
        if b.absent:
            notes.append(f"absent: {b.name}: {b.absent}")
        elif not b.correct:
            notes.append(f"WRONG {b.name} M={b.M} {b.N}x{b.K}: {b.message}")
    return "\n".join([*lines, *dict.fromkeys(notes), *_goals(records, header)])


def _goals(records: Sequence[Record], header: dict[str, Any] | None) -> list[str]:
    on_gpu = [record.to_dict() for record in records if record.device == "cuda"]
    gpu = (header or {}).get("gpu") or {"name": ""}
    found = [goal for goal in goals([{"records": on_gpu}], gpu["name"]) if goal.found is not None]
    return ["", text(found)] if found else []


def _speeds(threads: int, memory: Bandwidth) -> str:
    copied = f"copied at {memory.copy_gb_per_s:.1f} GB/s"
    if not memory.read_gb_per_s:
        return copied
    return f"read at {memory.read_gb_per_s:.1f} GB/s and {copied} with {threads} thread{'s' * (threads > 1)}"


def header_text(header: dict[str, Any], records: Sequence[Record]) -> str:
    """The header as lines of text."""
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in header["caches"].items()) or "unknown caches"
    commit = (
        f"{header['commit'][:12]}{' (changed)' if header['dirty'] else ''}" if header["commit"] else "not a checkout"
    )
    memory = {r.threads: r.memory for r in records if r.memory.copy_gb_per_s}
    measured = "; ".join(_speeds(threads, speed) for threads, speed in memory.items())
    lines = [
        f"{header['cpu']}, {header['cores']} cores, {caches}" + (f"; {header['gpu']['name']}" if header["gpu"] else ""),
        f"torch {header['torch']}, lutgemm {header['lutgemm']} ({commit}), python {header['python']}, {header['date']}",
        f"memory is {measured}" if measured else "",
        BUSY.format(**header) if header["load"] and header["load"] > BUSY_LOAD * header["cores"] else "",
        f"$ {header['command']}",
    ]
    return "\n".join(line for line in lines if line)
