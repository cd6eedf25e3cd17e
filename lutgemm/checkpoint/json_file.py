"""Bounded, strict JSON files: what is read may come from anyone, what is written is the same bytes every time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MAX_DEPTH = 64
"""Deepest nesting that is accepted; real configurations stay below ten."""

CONFIG_LIMIT = 16 << 20
INDEX_LIMIT = 128 << 20
"""Largest accepted file in bytes: a configuration, and an index or report that names every tensor."""


class _JSONProblem(ValueError):
    """A JSON document that parses but is not accepted."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _JSONProblem(f"the key {repeated[:200]!r} appears twice in one object")
    return result


def _constant(text: str) -> Any:
    raise _JSONProblem(f"the value {text} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _JSONProblem(f"the number {text[:40]} is too large")
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            return depth
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def parse_object(data: bytes, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises `CheckpointError` naming `what` and `remedy` for anything else."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what}: not UTF-8 text (byte {error.start}); {remedy}") from None
    except RecursionError:
        raise CheckpointError(f"{what}: JSON nested deeper than {MAX_DEPTH} levels; {remedy}") from None
    except ValueError as error:
        raise CheckpointError(f"{what}: not valid JSON: {error}; {remedy}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: holds a JSON {type(value).__name__}, expected an object; {remedy}")
    if _depth(value) > MAX_DEPTH:
        raise CheckpointError(f"{what}: JSON nested deeper than {MAX_DEPTH} levels; {remedy}")
    return value


def read_bytes(path: Path, limit: int, remedy: str) -> bytes:
    """The whole file when it is a regular file of at most `limit` bytes; `CheckpointError` otherwise."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; {remedy}")
        with path.open("rb") as handle:
            data = handle.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {remedy}") from None
    if len(data) > limit:
        raise CheckpointError(f"{path}: larger than {limit} bytes, too large for this kind of file; {remedy}")
    return data


def read_json(
    path: Path, limit: int = CONFIG_LIMIT, remedy: str = "download or write the file again"
) -> dict[str, Any]:
    """The JSON object in `path`, at most `limit` bytes, keys unique, at most `MAX_DEPTH` deep."""
    return parse_object(read_bytes(path, limit, remedy), str(path), remedy)


def dump_json(value: Any) -> bytes:
    """UTF-8 JSON with a final newline; NaN and Infinity are refused by `ValueError`."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
