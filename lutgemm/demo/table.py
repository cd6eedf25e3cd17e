"""The demo's table and texts, as plain text and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

HEADINGS = ("variant", "file MB", "bits/weight", "perplexity", "tokens/s", "vs fp32")


def number(value: float) -> str:
    """Four significant digits or so: 19.13, 262.4, 1.2e+05."""
    if value >= 99_999.5:
        return f"{value:.1e}"
    return f"{value:.2f}" if value < 999.995 else f"{value:.0f}"


def cells(row: Mapping[str, Any], fp32_speed: float) -> tuple[str, ...]:
    """One row as text, in the order of `HEADINGS`."""
    speed = row["speed"]["tokens_per_s"]
    name = f"  {row['name']}" if row["kind"] == "rtn" else row["name"]
    return (
        name,
        f"{row['file_bytes'] / 1e6:.1f}",
        f"{row['bits_per_weight']:.3f}",
        number(row["perplexity"]["perplexity"]),
        f"{speed:.1f}",
        f"{speed / fp32_speed:.2f}x",
    )


def _grid(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: Sequence[Mapping[str, Any]] = record["rows"]
    fp32 = next(row["speed"]["tokens_per_s"] for row in rows if row["kind"] == "torch" and row["dtype"] == "float32")
    return [HEADINGS, *(cells(row, fp32) for row in rows)]


def notes(record: Mapping[str, Any]) -> list[str]:
    """What the numbers depend on, one sentence each."""
    speed, scored = record["rows"][0]["speed"], record["rows"][0]["perplexity"]
    return [
        f"Model: {record['model']}.",
        "File: the weights on disk; the embedding, tied to the output layer, stays in the checkpoint's precision.",
        "Bits/weight: over the quantized linear layers, scales, offsets, zeros and codebooks counted.",
        f"Perplexity: {record['text']}; {scored['tokens']} scored, context {record['context']}, stride "
        f"{record['stride']}; {record['bos']}.",
        f"Tokens/s: greedy decode of {speed['new_tokens']} tokens after a prompt of {speed['prompt_tokens']}, batch 1, "
        f"median of {len(speed['samples'])} rounds, all rows in turns; {record['machine']}.",
        "RTN: plain round-to-nearest of the total bits nearest to the row above it, in the same container and kernels.",
    ]


def render(record: Mapping[str, Any]) -> str:
    """The table for a terminal, its notes below. `record` is what results.json holds."""
    grid = _grid(record)
    widths = [max(len(row[i]) for row in grid) for i in range(len(HEADINGS))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in grid
    ]
    lines.insert(1, "-" * len(lines[0]))
    wrapped = [line for note in notes(record) for line in textwrap.wrap(note, 110, subsequent_indent="  ")]
    return "\n".join([*lines, "", *wrapped, ""])


def render_markdown(record: Mapping[str, Any]) -> str:
    """The table as Markdown, for a README."""
    rows = ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in _grid(record)]
    rows.insert(1, "|---|" + "---:|" * (len(HEADINGS) - 1))
    return "\n".join(rows) + "\n"


def render_texts(record: Mapping[str, Any]) -> str:
    """What every row answers to the prompt."""
    blocks = [f"Prompt: {record['prompt']}", ""]
    for row in record["rows"]:
        answer = " ".join(row["text"].split()) or "(nothing)"
        blocks += [f"{row['name']}:", textwrap.fill(answer, 110, initial_indent="  ", subsequent_indent="  "), ""]
    return "\n".join(blocks)
