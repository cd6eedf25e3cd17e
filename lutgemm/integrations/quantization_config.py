"""`quantization_config` of a checkpoint's config.json: what is quantized, in which layout. Nothing else states it.

    {"quant_method": "lutgemm", "format_version": 1, "producer": "lutgemm X", "config": {...} or null,
     "layers": [{"layout": <Layout.to_dict()>, "modules": [full module names]}, ...]}

A module is quantized if and only if it is listed. Layouts are what is on disk; N and K come from the model's module.
`config` is what was asked for, and null where that is not known (an imported checkpoint).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import BCQConfig, CodebookConfig, QuantizeConfig, config_from_dict
from ..errors import CheckpointError, LutgemmError
from ..formats import FORMAT_VERSION, LAYOUTS, Layout, layout_from_dict

QUANT_METHOD = "lutgemm"
KNOWN_VERSIONS = (FORMAT_VERSION,)
WHERE = "config.json, quantization_config"
REMEDY = "download the checkpoint or quantize the model again"


def producer() -> str:
    """`"lutgemm <version>"`."""
    from .. import __version__

    return f"lutgemm {__version__}"


@dataclass(frozen=True)
class CheckpointConfig:
    """A parsed `quantization_config`: what was asked for, and the layout entry of each quantized module."""

    config: BCQConfig | CodebookConfig | None
    layers: Mapping[str, Mapping[str, Any]]
    producer: str


def layers_to_json(layouts: Mapping[str, Layout]) -> list[dict[str, Any]]:
    """Module name -> layout, as the `layers` list: one entry per distinct layout, in order of first appearance."""
    entries: dict[str, dict[str, Any]] = {}
    for name, layout in layouts.items():
        described = layout.to_dict()
        entry = entries.setdefault(json.dumps(described, sort_keys=True), {"layout": described, "modules": []})
        entry["modules"].append(name)
    return list(entries.values())


def layers_from_json(layers: Any) -> dict[str, dict[str, Any]]:
    """The `layers` list -> module name -> its layout entry. Raises `CheckpointError` naming what is malformed."""
    if not isinstance(layers, list):
        raise CheckpointError(f"{WHERE}: layers must be a list, got {_short(layers)}; {REMEDY}")
    found: dict[str, dict[str, Any]] = {}
    for i, entry in enumerate(layers):
        where = f"{WHERE}: layers[{i}]"
        if not isinstance(entry, dict) or entry.keys() != {"layout", "modules"}:
            raise CheckpointError(f"{where} must be an object of 'layout' and 'modules', got {_short(entry)}; {REMEDY}")
        layout, modules = entry["layout"], entry["modules"]
        if not isinstance(layout, dict) or layout.get("format") not in LAYOUTS:
            raise CheckpointError(
                f"{where}.layout must name a format of {sorted(LAYOUTS)}, got {_short(layout)}; {REMEDY}"
            )
        if not isinstance(modules, list) or not all(isinstance(name, str) and name for name in modules):
            raise CheckpointError(f"{where}.modules must be a list of module names, got {_short(modules)}; {REMEDY}")
        for name in modules:
            if name in found:
                raise CheckpointError(f"{where}.modules: {name!r} is listed twice; {REMEDY}")
            found[name] = layout
    return found


def layout_of(name: str, entry: Mapping[str, Any], out_features: int, in_features: int) -> Layout:
    """The layout of module `name` (N x K) that its entry describes. Raises `CheckpointError` naming the module."""
    try:
        return layout_from_dict(entry, out_features, in_features)
    except (LutgemmError, TypeError) as error:
        raise CheckpointError(f"{WHERE}: {name} ({out_features} x {in_features}): {error}") from None


def build(config: QuantizeConfig | None, layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """The `quantization_config` object of a checkpoint whose quantized modules have these layouts."""
    return describe(config, layers_to_json(layouts), producer())


def describe(config: QuantizeConfig | None, layers: list[dict[str, Any]], made_by: str) -> dict[str, Any]:
    """The `quantization_config` object of a checkpoint with this `layers` list."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "producer": made_by,
        "config": None if config is None else config.to_dict(),
        "layers": layers,
    }


def parse(entry: Any) -> CheckpointConfig:
    """A `quantization_config` object, validated. Fields it does not know are ignored.

    Raises `CheckpointError` when it is not ours, of an unknown version, or malformed.
    """
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{WHERE} must be an object, got {_short(entry)}; {REMEDY}")
    if entry.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{WHERE}: quant_method is {entry.get('quant_method')!r}, lutgemm reads {QUANT_METHOD!r}")
    check_version(entry.get("format_version"))
    asked = entry.get("config")
    if asked is not None and not isinstance(asked, Mapping):
        raise CheckpointError(f"{WHERE}: config must be an object or null, got {_short(asked)}; {REMEDY}")
    try:
        config = None if asked is None else config_from_dict(asked)
    except (LutgemmError, TypeError) as error:
        raise CheckpointError(f"{WHERE}: config: {error}; {REMEDY}") from None
    return CheckpointConfig(config, layers_from_json(entry.get("layers")), str(entry.get("producer", "unknown")))


def check_version(version: Any) -> None:
    """Raise `CheckpointError` unless `version` is a format version that this lutgemm reads."""
    if isinstance(version, bool) or version not in KNOWN_VERSIONS:
        raise CheckpointError(
            f"{WHERE}: format_version {_short(version)} is unknown; {producer()} reads {list(KNOWN_VERSIONS)}. "
            "Install a newer lutgemm, or quantize the model again"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
