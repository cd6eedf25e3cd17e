"""What a checkpoint's safetensors files hold, checked against the layouts that config.json lists, before any load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..checkpoint.reader import inside, leads_outside
from ..errors import CheckpointError
from ..formats import Layout
from ..formats.base import dtype_name
from .quantization_config import REMEDY

INDEX_FILE = "model.safetensors.index.json"
_SAFETENSORS_NAMES = {"int32": "I32", "int16": "I16", "uint8": "U8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # fmt: skip  # noqa: E501


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its name there, its dtype (safetensors' name for it) and shape."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]


def check_places(source: str, files: Iterable[str]) -> None:
    """Raise `CheckpointError` when a file that is about to be read, or the end of a link, lies outside its checkpoint.

    source: the checkpoint's folder, or a Hub model id; the files of the latter belong to a snapshot in the cache, whose
    links may point to the blobs of the same repository.
    """
    local = Path(source)
    if local.is_dir():
        for name in ("config.json", INDEX_FILE):
            inside(local, name, source)
    for file in map(Path, files):
        root = local if local.is_dir() else _snapshot(file)
        if not file.is_relative_to(root) or ".." in file.relative_to(root).parts:
            raise CheckpointError(
                f"{source}: its index or config.json names {file}, outside the checkpoint; a shard lies beside "
                "config.json. Do not use this checkpoint, or correct the index"
            )
        if leads_outside(file, root):
            raise CheckpointError(
                f"{file}: is a link to {file.resolve()}, outside the checkpoint; replace the link by the file itself"
            )


def _snapshot(file: Path) -> Path:
    """The snapshot of a Hugging Face cache that holds `file`, else the folder of `file`."""
    return next((folder for folder in file.parents if folder.parent.name == "snapshots"), file.parent)


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
                    found[name] = StoredTensor(file, name, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: damaged or unreadable ({error}); copy or download it again") from None
    return found


def check_layer(stored: Mapping[str, StoredTensor], name: str, layout: Layout, bias: bool) -> None:
    """Raise `CheckpointError` unless exactly the tensors of `layout` (and a bias) are stored for layer `name`."""
    own = {key[len(name) + 1 :] for key in stored if key.startswith(f"{name}.")}
    wanted = layout.specs()
    required = wanted.keys() | ({"bias"} if bias else set())
    if missing := required - own:
        raise CheckpointError(f"{name}: {sorted(missing)} missing from the checkpoint's files; {REMEDY}")
    if extra := own - required:
        raise CheckpointError(f"{name}: {sorted(extra)} stored beside the tensors of a {layout.format} layer; {REMEDY}")
    for tensor, spec in wanted.items():
        entry, dtype = stored[f"{name}.{tensor}"], dtype_name(spec.dtype)
        if entry.dtype != _SAFETENSORS_NAMES[dtype] or entry.shape != spec.shape:
            raise CheckpointError(
                f"{entry.file}: {name}.{tensor} is {entry.dtype} {list(entry.shape)}, "
                f"config.json says {_SAFETENSORS_NAMES[dtype]} {list(spec.shape)}; {REMEDY}"
            )


def check_unlisted(stored: Mapping[str, StoredTensor], listed: Iterable[str]) -> None:
    """Raise `CheckpointError` for quantized tensors of a layer that config.json does not list."""
    known = set(listed)
    for name, entry in stored.items():
        layer, _, tensor = name.rpartition(".")
        if tensor == "header" and layer not in known:
            raise CheckpointError(f"{entry.file}: {layer} is quantized, but config.json does not list it; {REMEDY}")
