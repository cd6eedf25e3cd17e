"""What a checkpoint holds, from its headers alone: formats, layouts, bits per weight, coverage, file sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, FormatError
from ..formats import FORMATS, Layout
from ..formats.base import HEADER_WORDS
from ..integrations.quantization_config import QUANT_METHOD, CheckpointConfig, layout_of, parse
from .json_file import INDEX_LIMIT, read_json
from .reader import REPORT_NAME, CheckpointFolder
from .records import RECORD_TENSORS, load_record
from .report import layout_text
from .safetensors_file import TORCH_DTYPES


def quantization_of(folder: CheckpointFolder) -> CheckpointConfig:
    """The parsed `quantization_config`. Raises `CheckpointError` when lutgemm did not quantize this checkpoint."""
    if folder.quant_method != QUANT_METHOD:
        raise CheckpointError(
            f"{folder.folder}: was not quantized by lutgemm (quant_method is {folder.quant_method!r}); "
            "give a folder that `lutgemm quantize` wrote"
        )
    return parse(folder.config["quantization_config"])


def layouts_of(folder: CheckpointFolder, config: CheckpointConfig) -> dict[str, Layout]:
    """Module -> layout: N and K from the record's 32-byte header, the rest from `quantization_config`; both must agree
    with the shapes and dtypes of the tensors in the file. Raises `CheckpointError` or `FormatError`.
    """
    layouts = {}
    for module, entry in config.layers.items():
        header = folder_header(folder, module)
        try:
            layout = layout_of(module, entry, header[2], header[3])
        except CheckpointError as error:
            raise CheckpointError(f"{folder.folder}: {error}; quantize or download the model again") from None
        if header != layout.header().tolist():
            raise FormatError(
                f"{folder.folder}: layer {module!r}: header {header} contradicts quantization_config {dict(entry)}; "
                "quantize or download the model again"
            )
        _check_tensors(folder, module, layout)
        layouts[module] = layout
    return layouts


def folder_header(folder: CheckpointFolder, module: str) -> list[int]:
    """The int32 `[8]` header of one record."""
    name = f"{module}.header"
    if name not in folder.where:
        raise CheckpointError(
            f"{folder.folder}: layer {module!r} is listed in quantization_config, but tensor {name!r} is missing; "
            "quantize or download the model again"
        )
    entry = folder.entry(name)
    if entry.dtype != "I32" or entry.shape != (HEADER_WORDS,):
        raise FormatError(
            f"{folder.file_of(name).path}: tensor {name!r} is {entry.dtype} {list(entry.shape)}, expected I32 "
            f"[{HEADER_WORDS}]; quantize or download the model again"
        )
    return [int(word) for word in folder.file_of(name).read(name).tolist()]


def _check_tensors(folder: CheckpointFolder, module: str, layout: Layout) -> None:
    specs = layout.specs()
    for name, spec in specs.items():
        full = f"{module}.{name}"
        if full not in folder.where:
            raise CheckpointError(f"{folder.folder}: tensor {full!r} is missing; quantize or download the model again")
        entry = folder.entry(full)
        if TORCH_DTYPES.get(entry.dtype, torch.complex128) != spec.dtype or entry.shape != spec.shape:
            raise FormatError(
                f"{folder.file_of(full).path}: tensor {full!r} is {entry.dtype} {list(entry.shape)}, its layout says "
                f"{spec.dtype} {list(spec.shape)}; quantize or download the model again"
            )
    for name in RECORD_TENSORS:
        if name not in specs and f"{module}.{name}" in folder.where:
            raise FormatError(
                f"{folder.folder}: tensor '{module}.{name}' does not belong to the layout {layout.to_dict()}; "
                "quantize or download the model again"
            )


def check_record_values(folder: CheckpointFolder, layouts: Mapping[str, Layout]) -> None:
    """Read every record and check its values: codes within the codebook, no NaN, no padding. Raises `FormatError`."""
    for module, layout in layouts.items():
        record = load_record(folder, module, layout.format)
        try:
            record.check_values()
        except FormatError as error:
            raise FormatError(
                f"{folder.folder}: layer {module!r}: {error}; quantize or download the model again"
            ) from None


def inspect_checkpoint(path: str | Path, values: bool = False) -> dict[str, Any]:
    """What the checkpoint in folder `path` holds, as JSON values. `values`: read and check every record as well."""
    folder = CheckpointFolder(path)
    result: dict[str, Any] = {
        "path": str(path),
        "model_type": folder.config.get("model_type"),
        "quant_method": folder.quant_method,
        "files": {name: file.size for name, file in folder.shards.items()},
        "tensors": len(folder.where),
    }
    if folder.quant_method != QUANT_METHOD:
        return result | {"weights": folder.num_weights, "bytes": folder.file_bytes, "dtypes": _dtypes(folder)}
    config = quantization_of(folder)
    layouts = layouts_of(folder, config)
    if values:
        check_record_values(folder, layouts)
    records = {f"{module}.{name}" for module, layout in layouts.items() for name in layout.specs()}
    quantized = sum(math.prod(layout.shape) for layout in layouts.values())
    record_bytes = sum(layout.nbytes for layout in layouts.values())
    others = [folder.entry(name) for name in folder.where if name not in records]
    weights = quantized + sum(entry.numel for entry in others)
    total = record_bytes + sum(entry.nbytes for entry in others)
    return result | {
        "producer": config.producer,
        "format_version": folder.config["quantization_config"]["format_version"],
        "config": config.config.to_dict() if config.config else None,
        "formats": sorted({layout.format for layout in layouts.values()} & FORMATS.keys()),
        "layers": [
            {
                "module": module,
                "shape": list(layout.shape),
                "layout": layout.to_dict(),
                "bits_per_weight": layout.bits_per_weight,
                "bytes": layout.nbytes,
            }
            for module, layout in layouts.items()
        ],
        "bits_per_quantized_weight": 8 * record_bytes / max(1, quantized),
        "bits_per_weight_of_model": 8 * total / max(1, weights),
        "weights": weights,
        "bytes": folder.file_bytes,
        "values_checked": values,
        **_from_report(folder),
    }


def _dtypes(folder: CheckpointFolder) -> dict[str, int]:
    """dtype -> number of elements."""
    counts: dict[str, int] = {}
    for name in folder.where:
        entry = folder.entry(name)
        counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.numel
    return counts


def _from_report(folder: CheckpointFolder) -> dict[str, Any]:
    """Coverage and what was left alone, which only the report knows; None and empty without one."""
    path = folder.folder / REPORT_NAME
    report = read_json(path, INDEX_LIMIT, "delete it, it is not needed to load the model") if path.is_file() else {}
    totals, left = report.get("totals"), report.get("left_alone")
    coverage = totals.get("coverage_percent") if isinstance(totals, dict) else None
    return {
        "coverage_percent": coverage if isinstance(coverage, (int, float)) else None,
        "left_alone": [item for item in left if isinstance(item, dict)] if isinstance(left, list) else [],
    }


def inspection_text(result: Mapping[str, Any]) -> str:
    """The inspection as a table and a few lines."""
    lines = [f"{result['path']}: model_type {result['model_type']}, {result['tensors']} tensors"]
    if result["quant_method"] != QUANT_METHOD:
        kind = f"quantized by {result['quant_method']!r}, not lutgemm" if result["quant_method"] else "not quantized"
        lines.append(f"{kind}; {result['weights']:,} weights: {result['dtypes']}")
    else:
        lines += [
            f"quantized by {result['producer']}, format version {result['format_version']}",
            f"{'bits/weight':>11} {'KB':>10}  {'N x K':<15} {'layout':<44} layer",
        ]
        for layer in result["layers"]:
            shape = f"{layer['shape'][0]} x {layer['shape'][1]}"
            lines.append(
                f"{layer['bits_per_weight']:>11.3f} {layer['bytes'] / 1e3:>10.1f}  {shape:<15} "
                f"{layout_text(layer['layout']):<44} {layer['module']}"
            )
        coverage = result["coverage_percent"]
        covered = "unknown (no report.json)" if coverage is None else f"{coverage:.1f} % of all linear weights"
        lines += [
            f"{len(result['layers'])} layers quantized, coverage: {covered}",
            f"average bits per weight: {result['bits_per_quantized_weight']:.3f} over quantized layers, "
            f"{result['bits_per_weight_of_model']:.3f} over the whole model",
        ]
        lines += [f"left alone: {item.get('name')}: {item.get('reason')}" for item in result["left_alone"]]
        if result["values_checked"]:
            lines.append("all values of all records are valid")
    lines += [f"{name}: {size:,} bytes" for name, size in result["files"].items()]
    return "\n".join(lines)
