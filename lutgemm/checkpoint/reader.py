"""A Hugging Face checkpoint folder, opened with suspicion: nothing outside it is read, nothing in it is executed."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .json_file import CONFIG_LIMIT, INDEX_LIMIT, read_bytes, read_json
from .safetensors_file import SafetensorsFile, TensorEntry

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
REPORT_NAME = "report.json"
STATE_NAME = "lutgemm-state.json"

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".pkl", ".pickle")
"""Weights of other kinds: never opened (several can run code when unpickled), never copied."""


def leads_outside(path: Path, root: Path) -> bool:
    """Whether `path`, its links followed, lies outside the folder `root`.

    Where `root` lies in a snapshot of a Hugging Face cache, the blobs of the same repository count as inside.
    """
    target, root = path.resolve(), root.resolve()
    if target.is_relative_to(root):
        return False
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
            return not target.is_relative_to(repository / "blobs")
    return True


def inside(folder: Path, name: str, said_by: str, root: Path | None = None) -> Path:
    """The file `name` of `folder`. Raises `CheckpointError` when the name or a symbolic link leads outside of `root`.

    root: the checkpoint's folder, where `folder` is one inside it.
    """
    if not name or "\0" in name or "\\" in name or PurePosixPath(name).name != name or name in (".", ".."):
        raise CheckpointError(
            f"{said_by}: file name {name[:200]!r} is not a plain name inside the folder; "
            "do not use this checkpoint, or correct the index"
        )
    path = folder / name
    if path.is_symlink() and leads_outside(path, root or folder):
        raise CheckpointError(
            f"{path}: is a link to {path.resolve()}, outside the checkpoint; replace the link by the file itself"
        )
    return path


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name, as `model.safetensors.index.json` says. Raises `CheckpointError`."""
    remedy = "download the index again"
    weight_map = read_json(path, INDEX_LIMIT, remedy).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing, empty or not an object; {remedy}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{path}: weight_map[{name[:200]!r}] is not a file name; {remedy}")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: weight_map[{name[:200]!r}] is {shard[:200]!r}, only .safetensors shards are read; {remedy}"
            )
    return weight_map


def refuse_unfinished(folder: Path) -> None:
    """Raise `CheckpointError` when a conversion into `folder` has not ended."""
    if (folder / STATE_NAME).is_file():
        raise CheckpointError(
            f"{folder}: holds an unfinished conversion; finish it by the same `lutgemm quantize` command with --resume"
        )


class CheckpointFolder:
    """The configuration and the safetensors shards of a checkpoint, headers read and checked.

    `shards` maps file name to file, `where` maps tensor name to file name. Raises `CheckpointError` naming the file
    and the remedy when the folder is not a complete, consistent safetensors checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; give the folder of a Hugging Face checkpoint")
        refuse_unfinished(self.folder)
        self.config = read_json(
            inside(self.folder, CONFIG_NAME, str(folder)),
            CONFIG_LIMIT,
            "give the folder of a Hugging Face checkpoint (config.json and .safetensors files)",
        )
        self.sharded = not (self.folder / SINGLE_NAME).exists() and (self.folder / INDEX_NAME).exists()
        self.shards: dict[str, SafetensorsFile] = {}
        self.where: dict[str, str] = {}
        if self.sharded:
            self._open_sharded()
        else:
            self._open_single()

    def _open_single(self) -> None:
        path = inside(self.folder, SINGLE_NAME, str(self.folder))
        if not path.is_file():
            raise CheckpointError(self._no_weights())
        self._add(SINGLE_NAME, path)

    def _no_weights(self) -> str:
        names = sorted(p.name for p in self.folder.iterdir())
        other = [name for name in names if name.endswith(OTHER_WEIGHTS)]
        text = f"{self.folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}"
        if other:
            return (
                f"{text}; {other[0]} is not read, because such files can run code when opened. Convert it first, for "
                "example: AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(NEW), in an environment you trust"
            )
        return f"{text}; download the checkpoint again, its weights are missing"

    def _open_sharded(self) -> None:
        index_path = inside(self.folder, INDEX_NAME, str(self.folder))
        index = read_index(index_path)
        for name in sorted(set(index.values())):
            path = inside(self.folder, name, str(index_path))
            if not path.is_file():
                raise CheckpointError(f"{path}: shard missing, {INDEX_NAME} names it; download the checkpoint again")
            self._add(name, path)
        for tensor, shard in index.items():
            if self.where.get(tensor) != shard:
                found = f"it is in {self.where[tensor]}" if tensor in self.where else "no shard has it"
                raise CheckpointError(
                    f"{index_path}: says tensor {tensor[:200]!r} is in {shard}, but {found}; "
                    "download the checkpoint again"
                )

    def _add(self, name: str, path: Path) -> None:
        file = SafetensorsFile(path)
        for tensor in file.entries:
            if tensor in self.where:
                raise CheckpointError(
                    f"{path}: tensor {tensor[:200]!r} is also in {self.where[tensor]}; download the checkpoint again"
                )
            self.where[tensor] = name
        self.shards[name] = file

    def file_of(self, tensor: str) -> SafetensorsFile:
        return self.shards[self.where[tensor]]

    def entry(self, tensor: str) -> TensorEntry:
        return self.file_of(tensor).entries[tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.entry(name).shape for name in self.where}

    @property
    def file_bytes(self) -> int:
        """Size of all shards together."""
        return sum(file.size for file in self.shards.values())

    @property
    def num_weights(self) -> int:
        return sum(self.entry(name).numel for name in self.where)

    @property
    def quant_method(self) -> str | None:
        """What `quantization_config` says this checkpoint is quantized with; None when it is not."""
        entry: Any = self.config.get("quantization_config")
        if entry is None:
            return None
        return str(entry.get("quant_method", "an unnamed method")) if isinstance(entry, dict) else "an unnamed method"

    def identity(self) -> dict[str, Any]:
        """Tells this checkpoint from any other, or a later version of it, without reading its tensors."""
        config = read_bytes(self.folder / CONFIG_NAME, CONFIG_LIMIT, "download it again")
        files = {
            name: {"size": file.size, "mtime_ns": file.path.stat().st_mtime_ns, "header_sha256": file.header_sha256}
            for name, file in sorted(self.shards.items())
        }
        return {"config_sha256": hashlib.sha256(config).hexdigest(), "files": files}


def open_source(folder: str | Path) -> CheckpointFolder:
    """A checkpoint to quantize. Raises `CheckpointError` when it is quantized already."""
    source = CheckpointFolder(folder)
    if method := source.quant_method:
        raise CheckpointError(
            f"{folder}: is already quantized (quantization_config says {method[:80]!r}); "
            "give the original, unquantized checkpoint as SRC"
        )
    return source


def local_folder(source: str, revision: str | None = None) -> Path:
    """The folder that `source` names: itself, or a hub id downloaded (safetensors and small files only).

    Raises `CheckpointError` when it is neither.
    """
    path = Path(source)
    if path.is_dir():
        return path
    looks_like_id = source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not path.exists()
    if not looks_like_id:
        raise CheckpointError(f"{source}: no such folder; give the folder of a Hugging Face checkpoint, or a hub id")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"{source}: no such folder, and downloading it from the hub needs huggingface_hub: "
            'pip install "lutgemm[hf]"'
        ) from None
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{source}: no such folder, and it could not be downloaded as a hub id: {first[:300]}; "
            "check the name and the network, or give a folder"
        ) from None
