"""The weight formats of SPEC.md. Registering a format here is enough for tests, conversion and loading to cover it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import FormatError
from .base import FORMAT_VERSION, Layout, QuantizedWeight, TensorSpec
from .bcq import BCQLayout, BCQWeight
from .codebook import CodebookLayout, CodebookWeight

FORMATS: dict[str, type[QuantizedWeight]] = {"bcq": BCQWeight, "codebook": CodebookWeight}
LAYOUTS: dict[str, type[BCQLayout] | type[CodebookLayout]] = {"bcq": BCQLayout, "codebook": CodebookLayout}


def _known(name: Any) -> str:
    if name not in FORMATS:
        raise FormatError(f"format={name!r} is unknown; this lutgemm knows {sorted(FORMATS)}")
    return str(name)


def layout_from_dict(entry: Mapping[str, Any], out_features: int, in_features: int) -> Layout:
    """The layout that a JSON entry (`Layout.to_dict`) describes for a layer of N x K."""
    return LAYOUTS[_known(entry.get("format"))].from_dict(entry, out_features, in_features)


def weight_from_state(format_name: str, state: Mapping[str, Tensor]) -> QuantizedWeight:
    """The weight of the named format held by `state`, every value checked. Raises `FormatError`."""
    return FORMATS[_known(format_name)].from_state_dict(state)


__all__ = [
    "FORMATS",
    "FORMAT_VERSION",
    "LAYOUTS",
    "BCQLayout",
    "BCQWeight",
    "CodebookLayout",
    "CodebookWeight",
    "Layout",
    "QuantizedWeight",
    "TensorSpec",
    "layout_from_dict",
    "weight_from_state",
]
