"""What a checkpoint's safetensors files hold, checked against the layouts that config.json lists, before any load."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..formats import Layout
from ..formats.base import dtype_name

INDEX_FILE = "model.safetensors.index.json"
_SAFETENSORS_NAMES = {"int32": "I32", "int16": "I16", "uint8": "U8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # fmt: skip  # noqa: E501


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies, and its dtype (safetensors' name for it) and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises `CheckpointError` when it is absent, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None


def check_index(folder: Path) -> None:
    """Raise `CheckpointError` when the folder's index names a file that is missing or outside the folder."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return
    content = read_json(path)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{path}: 'weight_map' must be an object of tensor name -> file name")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{path}: names {shard!r}; a shard is a plain file name beside the index")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{path}: names {shard!r}, which is missing; copy or download the checkpoint again")


def stored_tensors(files: Iterable[str]) -> dict[str, StoredTensor]:
    """Every tensor of the files, by name, from their headers alone. Raises `CheckpointError` naming a damaged file."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{file}: lutgemm reads safetensors files only")
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    part = handle.get_slice(name)
                    found[name] = StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: damaged or unreadable ({error}); copy or download it again") from None
    return found


def check_layer(stored: Mapping[str, StoredTensor], name: str, layout: Layout, bias: bool) -> None:
    """Raise `CheckpointError` unless exactly the tensors of `layout` (and a bias) are stored for layer `name`."""
    own = {key[len(name) + 1 :] for key in stored if key.startswith(f"{name}.")}
    wanted = layout.specs()
    required = wanted.keys() | ({"bias"} if bias else set())
    if missing := required - own:
        raise CheckpointError(f"{name}: {sorted(missing)} missing from the checkpoint's files; it is incomplete")
    if extra := own - required:
        raise CheckpointError(f"{name}: {sorted(extra)} stored beside the tensors of a {layout.format} layer")
    for tensor, spec in wanted.items():
        entry, dtype = stored[f"{name}.{tensor}"], dtype_name(spec.dtype)
        if entry.dtype != _SAFETENSORS_NAMES[dtype] or entry.shape != spec.shape:
            raise CheckpointError(
                f"{entry.file}: {name}.{tensor} is {entry.dtype} {list(entry.shape)}, "
                f"config.json says {_SAFETENSORS_NAMES[dtype]} {list(spec.shape)}"
            )


def check_unlisted(stored: Mapping[str, StoredTensor], listed: Iterable[str]) -> None:
    """Raise `CheckpointError` for quantized tensors of a layer that config.json does not list."""
    known = set(listed)
    for name, entry in stored.items():
        layer, _, tensor = name.rpartition(".")
        if tensor == "header" and layer not in known:
            raise CheckpointError(f"{entry.file}: {layer} is quantized, but config.json does not list it")
