"""Checks a quantized checkpoint against the one it was made from: every layer's error, every other tensor's bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import CheckpointError, LutgemmError
from ..formats import Layout
from ..quantize import weight_error
from .discover import Linear, discover
from .inspection import layouts_of, quantization_of
from .json_file import INDEX_LIMIT, read_json
from .reader import REPORT_NAME, CheckpointFolder, open_source
from .records import load_record, read_weight

REPORT_TOLERANCE = 1e-4
"""Relative difference accepted between a recomputed squared error and the report's: another device sums in another
order; a single wrong code of a layer changes more."""


def verify_checkpoint(dst: str | Path, src: str | Path, progress: bool = True) -> dict[str, Any]:
    """Compare the quantized checkpoint `dst` with its original `src`; `problems` is empty when all is well.

    Raises `CheckpointError` or `FormatError` when either cannot be read as a checkpoint at all.
    """
    folder, source = CheckpointFolder(dst), open_source(src)
    layouts = layouts_of(folder, quantization_of(folder))
    found = discover(source.config, source.shapes)
    linears = {linear.module: linear for linear in found.linears}
    reported, problems = _reported_errors(folder)
    layers = []
    total = sum(source.entry(name).nbytes for name in source.where)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc="verify") as bar:
        for module, layout in layouts.items():
            linear = linears.get(module)
            if linear is None or linear.tensor is None:
                problems.append(f"layer {module!r} is quantized, but SRC has no such linear layer")
                continue
            layers.append(_verify_layer(folder, source, linear, layout, reported, problems))
            bar.update(source.entry(linear.tensor).nbytes)
        quantized = {name: linears[name] for name in layouts if name in linears}
        copied = _verify_copies(folder, source, quantized, layouts, found.param_of, problems, bar)
    _verify_config(folder, source, problems)
    return {
        "dst": str(dst),
        "src": str(src),
        "ok": not problems,
        "problems": problems,
        "layers": layers,
        "copied_tensors": copied,
        "report_compared": reported is not None,
    }


def _reported_errors(folder: CheckpointFolder) -> tuple[dict[str, float] | None, list[str]]:
    """Module -> squared error that report.json states (None without that file), and what is wrong with it."""
    path = folder.folder / REPORT_NAME
    if not path.exists():
        return None, []
    try:
        layers = read_json(path, INDEX_LIMIT, "it is not needed to load the model")["layers"]
        return {str(layer["module"]): float(layer["squared_error"]) for layer in layers}, []
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        return {}, [f"{path}: damaged ({type(error).__name__}: {error})"]


def _verify_layer(
    folder: CheckpointFolder,
    source: CheckpointFolder,
    linear: Linear,
    layout: Layout,
    reported: Mapping[str, float] | None,
    problems: list[str],
) -> dict[str, Any]:
    """Values, shape and error of one layer; appends to `problems` what does not hold."""
    module = linear.module
    entry: dict[str, Any] = {"module": module, "shape": list(layout.shape), "ok": False}
    if layout.shape != (linear.out_features, linear.in_features):
        problems.append(f"layer {module!r} is {layout.shape}, SRC's is {(linear.out_features, linear.in_features)}")
        return entry
    assert linear.tensor is not None
    try:
        record = load_record(folder, module, layout.format)
        record.check_values()
        weight = read_weight(source, linear.tensor, linear.transposed)
        squared_error, squared_weight = weight_error(weight, record)
    except LutgemmError as error:
        problems.append(f"layer {module!r}: {error}")
        return entry
    relative = math.sqrt(squared_error / squared_weight) if squared_weight else 0.0
    entry |= {"relative_error": relative, "squared_error": squared_error, "ok": True}
    if reported is not None:
        stated = reported.get(module, math.nan)
        if not math.isclose(stated, squared_error, rel_tol=REPORT_TOLERANCE, abs_tol=1e-12 * squared_weight):
            entry["ok"] = False
            problems.append(f"layer {module!r}: squared error is {squared_error:.8g}, report.json says {stated:.8g}")
    return entry


def _verify_copies(
    folder: CheckpointFolder,
    source: CheckpointFolder,
    quantized: Mapping[str, Linear],
    layouts: Mapping[str, Layout],
    param_of: Mapping[str, str],
    problems: list[str],
    bar: Any,
) -> int:
    """Every other tensor of SRC is in DST bit by bit, and DST holds nothing else; the number of tensors compared."""
    weights = {linear.tensor for linear in quantized.values()}
    biases = {f"{module}.bias" for module in quantized}
    expected = {f"{module}.{name}" for module, layout in layouts.items() for name in layout.specs()}
    count = 0
    for tensor in source.where:
        if tensor in weights:
            continue
        param = param_of.get(tensor, tensor)
        name = param if param in biases else tensor
        expected.add(name)
        count += 1
        if problem := _compare(folder, name, source, tensor):
            problems.append(problem)
        bar.update(source.entry(tensor).nbytes)
    problems += [
        f"tensor {name!r} is in DST, but SRC has none like it" for name in folder.where if name not in expected
    ]
    return count


def _compare(folder: CheckpointFolder, name: str, source: CheckpointFolder, tensor: str) -> str | None:
    """How tensor `name` of DST differs from `tensor` of SRC, None when it does not."""
    if name not in folder.where:
        return f"tensor {name!r} of SRC is missing in DST"
    ours, theirs = folder.entry(name), source.entry(tensor)
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return f"tensor {name!r} is {ours.dtype} {list(ours.shape)}, SRC has {theirs.dtype} {list(theirs.shape)}"
    pairs = zip(folder.file_of(name).chunks(name), source.file_of(tensor).chunks(tensor), strict=True)
    if any(left != right for left, right in pairs):
        return f"tensor {name!r} differs from SRC"
    return None


def _verify_config(folder: CheckpointFolder, source: CheckpointFolder, problems: list[str]) -> None:
    ours = {key: value for key, value in folder.config.items() if key != "quantization_config"}
    changed = sorted(key for key in ours.keys() | source.config.keys() if ours.get(key) != source.config.get(key))
    if changed:
        problems.append(f"config.json differs from SRC in {changed[:8]}")


def verification_text(result: Mapping[str, Any]) -> str:
    """The result for people: each problem, or that there is none."""
    checked = [layer for layer in result["layers"] if "relative_error" in layer]
    worst = max(checked, key=lambda layer: layer["relative_error"], default=None)
    against = "and equal report.json" if result["report_compared"] else "(no report.json to compare with)"
    lines = [
        f"{len(checked)} layers recomputed {against}, {result['copied_tensors']} other tensors compared bit by bit",
    ]
    if worst is not None:
        lines.append(f"largest relative error: {worst['relative_error']:.5f} ({worst['module']})")
    if result["ok"]:
        lines.append("OK")
    else:
        lines += [f"PROBLEM: {problem}" for problem in result["problems"]]
    return "\n".join(lines)
