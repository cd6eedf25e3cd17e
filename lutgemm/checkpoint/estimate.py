"""`--dry-run`: what a conversion would write and cost, from the headers and a short timing of the quantizer."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..quantize import quantize
from .plan import Config, LayerPlan, Options, Plan, check_device, largest_layout, make_plan
from .reader import CheckpointFolder, open_source
from .records import check_finite
from .report import layout_text, left_alone_entry

SAMPLE_WEIGHTS = 1 << 18
"""Weights that are quantized to measure the speed of a configuration."""

WORKING_BYTES = 96 << 20
"""What quantizer slabs, buffers and the pages of torch's code take beside the record of the layer, at most; see
docs/checkpoints.md for the measurement."""


def _sample_seconds(source: CheckpointFolder, layer: LayerPlan, device: str) -> float:
    """Seconds per weight of quantizing the first rows of `layer`."""
    rows = min(layer.out_features, max(1, SAMPLE_WEIGHTS // layer.in_features))
    file = source.file_of(layer.tensor)
    stored = file.read(layer.tensor) if layer.transposed else file.read(layer.tensor, slice(0, rows))
    weight = stored.T[:rows] if layer.transposed else stored
    check_finite(stored, f"{file.path}: tensor {layer.tensor!r}")
    start = time.perf_counter()
    quantize(weight.to(device), layer.config)
    return (time.perf_counter() - start) / weight.numel()


def _layer_bytes(source: CheckpointFolder, layer: LayerPlan, device: str) -> int:
    """What grows with a layer: its record, and its weight where `read_weight` reads the whole of it."""
    record = largest_layout(layer.config, layer.out_features, layer.in_features).nbytes
    whole = layer.transposed or device != "cpu"
    return record + (source.entry(layer.tensor).nbytes if whole else 0)


def _resident_bytes() -> int:
    """Peak RSS of this process so far: `VmHWM`, because `ru_maxrss` starts with that of the parent process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def dry_run(src: str | Path, options: Options) -> dict[str, Any]:
    """The estimate as JSON values; nothing is written. Sizes are upper bounds where the quantizer chooses the kind."""
    check_device(options.device)
    source = open_source(src)
    plan = make_plan(source, options)
    memory = _resident_bytes() + WORKING_BYTES + max(_layer_bytes(source, x, options.device) for x in plan.layers)
    speeds: dict[Config, float] = {}
    groups: dict[tuple[int, int, Config], list[LayerPlan]] = {}
    for layer in plan.layers:
        groups.setdefault((layer.out_features, layer.in_features, layer.config), []).append(layer)
    rows = []
    for (n, k, config), layers in groups.items():
        if config not in speeds:
            speeds[config] = _sample_seconds(source, layers[0], options.device)
        layout = largest_layout(config, n, k)
        rows.append(
            {
                "layers": len(layers),
                "shape": [n, k],
                "layout": layout.to_dict(),
                "bits_per_weight_at_most": layout.bits_per_weight,
                "bytes_at_most": len(layers) * layout.nbytes,
                "seconds": len(layers) * n * k * speeds[config],
            }
        )
    return _summary(source, plan, rows, memory)


def _summary(source: CheckpointFolder, plan: Plan, rows: list[dict[str, Any]], memory: int) -> dict[str, Any]:
    quantized = {layer.tensor for layer in plan.layers}
    copied = sum(source.entry(name).nbytes for name in source.where if name not in quantized)
    records = sum(row["bytes_at_most"] for row in rows)
    return {
        "dry_run": True,
        "layers_found_by": plan.how,
        "groups": rows,
        "left_alone": [left_alone_entry(item) for item in plan.left_alone],
        "totals": {
            "layers": len(plan.layers),
            "coverage_percent": plan.coverage,
            "bits_per_quantized_weight_at_most": 8 * records / plan.quantized_weights,
            "bits_per_weight_of_model_at_most": 8 * (records + copied) / source.num_weights,
            "bytes_before": source.file_bytes,
            "bytes_after_at_most": records + copied,
            "peak_memory_bytes": memory,
            "seconds": sum(row["seconds"] for row in rows),
        },
    }


def duration(seconds: float) -> str:
    """`75.2` -> `1 min 15 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def dry_run_text(estimate: Mapping[str, Any]) -> str:
    """The estimate as a table and a few lines."""
    lines = [f"{'layers':>6}  {'N x K':<15} {'layout (at most)':<44} {'bits/weight':>11} {'MB':>9}"]
    for row in estimate["groups"]:
        shape = f"{row['shape'][0]} x {row['shape'][1]}"
        lines.append(
            f"{row['layers']:>6}  {shape:<15} {layout_text(row['layout']):<44} "
            f"{row['bits_per_weight_at_most']:>11.3f} {row['bytes_at_most'] / 1e6:>9.2f}"
        )
    t = estimate["totals"]
    lines += [
        "",
        f"{t['layers']} layers, {t['coverage_percent']:.1f} % of all linear weights, found by "
        f"{estimate['layers_found_by']}",
        f"average bits per weight, at most: {t['bits_per_quantized_weight_at_most']:.3f} over quantized layers, "
        f"{t['bits_per_weight_of_model_at_most']:.3f} over the whole model",
        f"weights files: {t['bytes_before'] / 1e6:,.1f} MB now, at most {t['bytes_after_at_most'] / 1e6:,.1f} MB after",
        f"estimated peak memory {t['peak_memory_bytes'] / 1e6:,.0f} MB, time {duration(t['seconds'])}",
        "left alone:",
        *_left_alone_lines(estimate["left_alone"]),
        "nothing was written (--dry-run)",
    ]
    return "\n".join(lines)


def _left_alone_lines(items: list[Mapping[str, Any]]) -> list[str]:
    """Reason -> what it applies to, a few names each."""
    by_reason: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        by_reason.setdefault(item["reason"], []).append(item)
    lines = []
    for reason, group in by_reason.items():
        names = ", ".join(item["name"] for item in group[:4]) + (
            f", ... ({len(group)} in all)" if len(group) > 4 else ""
        )
        weights = sum(math.prod(item["shape"]) for item in group)
        lines.append(f"  {names}: {weights:,} weights; {reason}")
    return lines or ["  nothing"]
