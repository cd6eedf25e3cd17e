"""Markdown tables of README.md out of committed runs: `python -m lutgemm.bench.readme README.md bench/results`.

A table lies between `<!-- table: NAME -->` and `<!-- end -->`; NAME is the stem of the run's JSON file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.S)


def _weights(record: Mapping[str, Any]) -> str:
    if record["op"] == "bcq_linear":
        return f"BCQ {record['bits']}-bit"
    return f"codebook {record['num_codebooks']}x{record['vec_len']}x{record['codebook_bits']}"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def kernel_table(run: Mapping[str, Any]) -> str:
    """The fastest algorithm of each case, threads and mode, with its ratio to torch of the same seconds.

    A ratio below 1 is in bold: there torch is faster.
    """
    best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for record in run["records"]:
        key = (record["M"], record["N"], record["K"], _weights(record), record["threads"], record["mode"])
        if record["correct"] and (key not in best or record["median_us"] < best[key]["median_us"]):
            best[key] = record
    head = ("weights", "bits per weight", "N x K", "M", "algorithm", "weights in", "us", "x fp32", "x bf16", "error")
    rows = []
    for key, record in sorted(best.items(), key=lambda item: (item[0][3], *item[0][:3])):
        ratios = [record["speedup_fp32"], record["speedup_bf16"]]
        cells = [f"**{_cell(r, '.2f')}**" if r is not None and r < 1 else _cell(r, ".1f") for r in ratios]
        rows.append(
            (
                key[3],
                f"{record['bits_per_weight']:.2f}",
                f"{record['N']}x{record['K']}",
                str(record["M"]),
                record["algorithm"],
                {"cold": "memory", "hot": "cache"}[record["mode"]],
                f"{record['median_us']:.0f}",
                *cells,
                f"{record['error']:.0e}",
            )
        )
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
    h = run["header"]
    source = f"{h['cpu']}, torch {h['torch']}, {h['date'][:10]}, `{h['command']}`"
    return "\n".join([*lines, "", source])


def update(text: str, results: Path) -> str:
    """`text` with every marked table made anew from `results/<name>.json`."""

    def table(match: re.Match[str]) -> str:
        run = json.loads((results / f"{match['name']}.json").read_text("utf-8"))
        return f"{match[1]}{kernel_table(run)}\n{match[3]}"

    return MARKED.sub(table, text)


def main(argv: Sequence[str] | None = None) -> int:
    page, results = map(Path, sys.argv[1:] if argv is None else argv)
    page.write_text(update(page.read_text("utf-8"), results), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
