"""Markdown tables of a page out of committed runs: `python -m lutgemm.bench.readme PAGE bench/results`.

A table lies between `<!-- table: NAME -->` and `<!-- end -->`; NAME is the stem of the JSON file of a run of
`lutgemm bench` or `lutgemm demo`. Of a bench run that is a choice of its rows (`is_headline`); `NAME all` has all, and
`NAME goals` the figures asked of GPUs and found, in that run and those whose names go on after a dash.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lutgemm.accuracy import DEFAULT
from lutgemm.demo.table import render_markdown

from .baselines import BASELINES
from .goals import goals, gpu_of, load, markdown

SHORT = {"torch_fp32": "fp32", "torch_bf16": "bf16"}
"""Baselines that a table calls by less than their label: torch's own matmul."""
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+)(?P<form> all| goals)? -->\n).*?(?P<end><!-- end -->)", re.S)

USUAL_GROUP = 128
"""Group size that a table leaves out."""

SQUARE = 4096
"""N = K of the shape of which a short table has every M."""


def _weights(record: Mapping[str, Any]) -> str:
    group = record["group_size"]
    suffix = "" if group == USUAL_GROUP else " g=K" if group == record["K"] else f" g{group}"
    if record["op"] == "bcq_linear":
        return f"BCQ {record['bits']}-bit{suffix}"
    return f"codebook {record['num_codebooks']}x{record['vec_len']}x{record['codebook_bits']}{suffix}"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _speedups(record: Mapping[str, Any]) -> Mapping[str, float | None]:
    """Baseline -> its time over ours; runs of 0.1.0 kept two."""
    if "speedup" in record:
        return record["speedup"]
    return {"torch_fp32": record["speedup_fp32"], "torch_bf16": record["speedup_bf16"]}


def _fastest(run: Mapping[str, Any], mode: str) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """Case and threads -> its fastest correct record of one mode."""
    best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for record in run["records"]:
        accuracy = record.get("accuracy", "")
        key = (_weights(record), accuracy, record["N"], record["K"], record["threads"], record["M"])
        if record["mode"] == mode and record["correct"] and record["median_us"] is not None:
            best[key] = min(record, best.get(key, record), key=lambda r: r["median_us"])
    return best


def is_headline(record: Mapping[str, Any]) -> bool:
    """Whether a short table has this record: one thread, the default accuracy and group size; other shapes at M = 1."""
    usual = record["threads"] == 1 and record.get("accuracy", DEFAULT) == DEFAULT
    square = record["N"] == record["K"] == SQUARE
    return usual and record["group_size"] == USUAL_GROUP and (square or record["M"] == 1)


def kernel_table(run: Mapping[str, Any], everything: bool = True) -> str:
    """The fastest algorithm of each case with weights from memory, and its ratio to the baselines of the same seconds.

    Without `everything` only the headlines. A ratio below 1 is in bold: there the baseline is faster. Columns of
    accuracy and of threads stand where they say something.
    """
    hot = _fastest(run, "hot")
    found = sorted((key, r) for key, r in _fastest(run, "cold").items() if everything or is_headline(r))
    names = [name for name in BASELINES if any(name in _speedups(record) for _, record in found)]
    labels = [SHORT.get(name, BASELINES[name].label) for name in names]
    accuracies = any(record.get("accuracy", DEFAULT) != DEFAULT for _, record in found)
    threads = len({record["threads"] for _, record in found}) > 1
    head = ["weights", *["accuracy"][: int(accuracies)], "bits/weight", "N x K", "M", *["threads"][: int(threads)]]
    rows = [[*head, "algorithm", "us", *(f"x {label}" for label in labels), "us in cache", "error"]]
    rows.append(["---"] * len(rows[0]))
    for key, record in found:
        ratios = [_speedups(record).get(name) for name in names]
        rows.append(
            [
                key[0],
                *[record.get("accuracy", "")][: int(accuracies)],
                f"{record['bits_per_weight']:.2f}",
                f"{record['N']}x{record['K']}",
                str(record["M"]),
                *[str(record["threads"])][: int(threads)],
                f"`{record['algorithm']}`",
                f"{record['median_us']:.0f}",
                *[f"**{_cell(r, '.2f')}**" if r is not None and r < 1 else _cell(r, ".1f") for r in ratios],
                _cell(hot[key]["median_us"] if key in hot else None, ".0f"),
                f"{record['error']:.0e}",
            ]
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    h = run["header"]
    source = f"{h['cpu']}, torch {h['torch']}, {h['date'][:10]}, `{h['command']}`"
    return "\n".join([*lines, "", source])


def demo_table(record: Mapping[str, Any]) -> str:
    """The table of `lutgemm demo`, out of its results.json."""
    text = f"perplexity on {record['text']}, context {record['context']}"
    return f"{render_markdown(record)}\n{record['machine']}, torch {record['versions']['torch']}, `make demo`; {text}"


def update(text: str, results: Path) -> str:
    """`text` with every marked table made anew from `results/<name>.json`."""

    def table(match: re.Match[str]) -> str:
        if match["form"] == " goals":
            files = [results / f"{match['name']}.json", *sorted(results.glob(f"{match['name']}-*.json"))]
            runs = load(files)
            gpu = gpu_of(runs)
            return f"{match[1]}{markdown(goals(runs, gpu))}{f' on {gpu}' * bool(gpu)}\n{match['end']}"
        run = json.loads((results / f"{match['name']}.json").read_text("utf-8"))
        rows = kernel_table(run, match["form"] is not None) if "records" in run else demo_table(run)
        return f"{match[1]}{rows}\n{match['end']}"

    return MARKED.sub(table, text)


def main(argv: Sequence[str] | None = None) -> int:
    page, results = map(Path, sys.argv[1:] if argv is None else argv)
    page.write_text(update(page.read_text("utf-8"), results), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
