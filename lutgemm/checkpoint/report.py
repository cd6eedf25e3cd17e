"""`report.json` and `report.md`: what a conversion did to every layer, what it left alone, and what it cost."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import __version__
from ..formats import FORMAT_VERSION
from .plan import LeftAlone, Options, Plan
from .reader import CheckpointFolder
from .records import LayerResult

REPORT_VERSION = 1


def build_report(
    source: CheckpointFolder,
    plan: Plan,
    options: Options,
    results: Sequence[LayerResult],
    files: Mapping[str, int],
    not_copied: Mapping[str, int],
    fingerprint: str,
) -> dict[str, Any]:
    """The report as JSON values. `files` maps the result's shards to their sizes in bytes, `not_copied` the files of
    SRC that are too large to be copied."""
    return {
        "report_version": REPORT_VERSION,
        "fingerprint": fingerprint,
        "settings": options.to_dict(),
        "layers_found_by": plan.how,
        "versions": versions(),
        "totals": totals(source, plan, results, files),
        "layers": [result.to_dict() for result in results],
        "left_alone": [left_alone_entry(item) for item in plan.left_alone],
        "files": dict(files),
        "not_copied": dict(not_copied),
    }


def versions() -> dict[str, Any]:
    """What the result was made with."""
    return {
        "lutgemm": __version__,
        "format_version": FORMAT_VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def left_alone_entry(item: LeftAlone) -> dict[str, Any]:
    return {
        "name": item.name,
        "kind": item.kind,
        "shape": list(item.shape),
        "counts_as_linear": item.counts,
        "reason": item.reason,
    }


def totals(
    source: CheckpointFolder, plan: Plan, results: Sequence[LayerResult], files: Mapping[str, int]
) -> dict[str, Any]:
    """Sums over all layers. Averages of bits count scales, offsets, zeros and codebooks; sizes are in bytes."""
    weights = sum(result.num_weights for result in results)
    record_bytes = sum(result.nbytes for result in results)
    quantized = {layer.tensor for layer in plan.layers}
    copied = sum(source.entry(name).nbytes for name in source.where if name not in quantized)
    squared_error = sum(result.squared_error for result in results)
    squared_weight = sum(result.squared_weight for result in results)
    return {
        "layers": len(results),
        "quantized_weights": weights,
        "linear_weights": plan.linear_weights,
        "coverage_percent": plan.coverage,
        "all_weights": source.num_weights,
        "bits_per_quantized_weight": 8 * record_bytes / weights,
        "bits_per_weight_of_model": 8 * (record_bytes + copied) / source.num_weights,
        "bytes_before": source.file_bytes,
        "bytes_after": sum(files.values()),
        "relative_error": math.sqrt(squared_error / squared_weight) if squared_weight else 0.0,
        "seconds": round(sum(result.seconds for result in results), 3),
    }


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """The totals as a few lines of text."""
    t = report["totals"]
    lines = [
        f"{t['layers']} layers quantized, {t['coverage_percent']:.1f} % of all linear weights "
        f"({t['quantized_weights']:,} of {t['linear_weights']:,})",
        f"average bits per weight: {t['bits_per_quantized_weight']:.3f} over quantized layers, "
        f"{t['bits_per_weight_of_model']:.3f} over the whole model",
        f"weights files: {t['bytes_before'] / 1e6:,.1f} MB before, {t['bytes_after'] / 1e6:,.1f} MB after "
        f"({t['bytes_before'] / max(1, t['bytes_after']):.2f}x smaller)",
        f"relative error of the weights (Frobenius): {t['relative_error']:.4f}",
        f"quantizing took {t['seconds']:.1f} s",
    ]
    experts = [item for item in report["left_alone"] if item["kind"] == "experts"]
    if experts:
        count = sum(math.prod(item["shape"]) for item in experts)
        lines.append(
            f"WARNING: {count:,} weights of experts are NOT quantized, "
            f"{100 * count / max(1, t['linear_weights']):.1f} % of the linear weights: "
            + ", ".join(item["name"] for item in experts[:4])
            + (f" and {len(experts) - 4} more (see left_alone)" if len(experts) > 4 else "")
        )
    return lines


def not_copied_lines(report: Mapping[str, Any]) -> list[str]:
    """A line for each file of SRC that was left behind for its size."""
    return [
        f"WARNING: {name} ({size / 1e6:,.0f} MB) is too large for a tokenizer or settings file and was NOT copied; "
        "copy it by hand if the model needs it"
        for name, size in report.get("not_copied", {}).items()
    ]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def report_markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = ["# lutgemm quantization report", ""]
    lines += [f"- {line}" for line in [*summary_lines(report), *not_copied_lines(report)]]
    settings = report["settings"]
    lines += [
        f"- layers found by: {report['layers_found_by']}",
        f"- configuration: `{settings['config']}`",
        *(f"- override `{pattern}`: `{fields}`" for pattern, fields in settings["modules"]),
        f"- versions: {', '.join(f'{name} {value}' for name, value in report['versions'].items())}",
        "",
        "Relative error is the Frobenius norm of W - W' over that of W; bits per weight count scales, offsets, zeros "
        "and codebooks.",
        "",
        "## Quantized layers",
        "",
        _row(["layer", "N x K", "kind", "bits per weight", "relative error", "SQNR dB", "seconds"]),
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for layer in report["layers"]:
        sqnr = "-" if layer["sqnr_db"] is None else f"{layer['sqnr_db']:.2f}"
        cells = [layer["module"], f"{layer['shape'][0]} x {layer['shape'][1]}", layout_text(layer["layout"])]
        cells += [f"{layer['bits_per_weight']:.3f}", f"{layer['relative_error']:.5f}", sqnr, f"{layer['seconds']:.2f}"]
        lines.append(_row(cells))
    lines += ["", "## Left alone", ""]
    if report["left_alone"]:
        lines += [_row(["weights", "shape", "reason"]), "|---|---|---|"]
        lines += [
            _row([item["name"], " x ".join(map(str, item["shape"])), item["reason"]]) for item in report["left_alone"]
        ]
    else:
        lines.append("Nothing: every linear layer is quantized.")
    lines += ["", "## Files", "", _row(["file", "bytes"]), "|---|---:|"]
    lines += [_row([name, f"{size:,}"]) for name, size in report["files"].items()]
    return "\n".join(lines) + "\n"


def layout_text(layout: Mapping[str, Any]) -> str:
    """A layout in a few words: `bcq 3 bits, group 64, uniform`."""
    if layout["format"] == "codebook":
        return (
            f"codebook {layout['num_codebooks']} x 2^{layout['codebook_bits']}, vec {layout['vec_len']}, "
            f"group {layout['group_size']}"
        )
    text = f"bcq {layout['bits']} bits, group {layout['group_size']}, {layout['scale_kind']}"
    return text + (" + offsets" if layout.get("has_offsets") else "")
