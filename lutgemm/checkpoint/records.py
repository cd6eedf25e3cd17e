"""Quantizing one layer of a checkpoint, its result kept as a small file ("piece") until its shard is put together."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, CheckpointError, FormatError, LutgemmError
from ..formats import FORMATS, Layout, QuantizedWeight, layout_from_dict
from ..formats.base import row_slabs
from ..quantize import WeightRows, quantize, weight_error
from ..quantize.slabs import SLAB_ELEMENTS, Weight, smaller_slabs
from .atomic import atomic_writer
from .plan import LayerPlan
from .reader import CheckpointFolder
from .safetensors_file import FLOATS, TORCH_DTYPES, OutputTensor, SafetensorsFile, tensor_bytes, write_safetensors

FINITE_SLAB = 1 << 19
"""Weights that are checked for NaN and Inf at a time; the check needs a few bytes for each."""

LARGE_TENSOR = 64 << 20
"""Bytes of the largest tensor from which on the quantizer's slabs have their full size."""

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer. Errors are sums of squares over the weight, in fp64; `seconds` is wall time."""

    module: str
    tensor: str
    shape: tuple[int, int]
    layout: dict[str, Any]
    bits_per_weight: float
    nbytes: int
    squared_error: float
    squared_weight: float
    seconds: float

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error over that of the weight (0 for a zero weight without error)."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else 0.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise ratio in dB; None when there is no noise or no signal."""
        if not self.squared_error or not self.squared_weight:
            return None
        return 10 * math.log10(self.squared_weight / self.squared_error)

    def to_dict(self) -> dict[str, Any]:
        extra = {"relative_error": self.relative_error, "sqnr_db": self.sqnr_db}
        return asdict(self) | {"shape": list(self.shape)} | extra

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> LayerResult:
        """The result that `to_dict` wrote. Raises `CheckpointError` when it is something else."""
        try:
            fields = {name: entry[name] for name in cls.__dataclass_fields__}
            result = cls(**(fields | {"shape": tuple(entry["shape"])}))
            if not isinstance(result.module, str) or not isinstance(result.tensor, str):
                raise ValueError("module and tensor must be names")
            layout = result.checked_layout()
            numbers = [result.squared_error, result.squared_weight, result.seconds]
            if not all(isinstance(n, (int, float)) and math.isfinite(n) and n >= 0 for n in numbers):
                raise ValueError("an error or time is not a number >= 0")
            if (result.nbytes, result.bits_per_weight) != (layout.nbytes, layout.bits_per_weight):
                raise ValueError("nbytes or bits_per_weight is not what the layout has")
        except KeyError as error:
            raise CheckpointError(f"entry of a layer: {error} is missing") from None
        except (TypeError, ValueError, AttributeError, LutgemmError) as error:
            raise CheckpointError(f"entry of a layer: {error}") from None
        return result

    def checked_layout(self) -> Layout:
        """The layout with N and K. Raises `LutgemmError`, `ValueError` or `TypeError` when there is none like it."""
        return layout_from_dict(self.layout, *self.shape)

    def is_of(self, layer: LayerPlan) -> bool:
        """Whether this is the result of quantizing `layer`."""
        return (self.module, self.tensor, self.shape) == (
            layer.module,
            layer.tensor,
            (layer.out_features, layer.in_features),
        )

    def is_in(self, file: SafetensorsFile) -> bool:
        """Whether `file` holds the tensors of the layout under the module's name, by dtype and shape."""
        for name, spec in self.checked_layout().specs().items():
            entry = file.entries.get(f"{self.module}.{name}")
            if entry is None or (TORCH_DTYPES.get(entry.dtype), entry.shape) != (spec.dtype, spec.shape):
                return False
        return True


class StoredWeight(WeightRows):
    """The weight `[N, K]` in a file, read row by row each time it is due: it is never in memory as a whole."""

    def __init__(self, file: SafetensorsFile, tensor: str) -> None:
        entry = file.entries[tensor]
        self.file, self.tensor = file, tensor
        self.shape = (entry.shape[0], entry.shape[1])
        self.dtype, self.device = TORCH_DTYPES[entry.dtype], torch.device("cpu")

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if isinstance(rows, slice):
            return self.file.read(self.tensor, rows)
        return self.file.read_rows(self.tensor, rows.tolist())


def slab_elements(source: CheckpointFolder) -> int:
    """Weights of a slab of the quantizer, so that it stays below twice the largest tensor of the checkpoint."""
    largest = max(source.entry(name).nbytes for name in source.where)
    return SLAB_ELEMENTS if largest >= LARGE_TENSOR else SLAB_ELEMENTS // 2


def return_free_memory() -> None:
    """Give the memory that malloc holds free back to the system, where the C library can (glibc): the holes that one
    stage leaves are of no use to the next, whose buffers have other sizes."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def read_weight(source: CheckpointFolder, tensor: str, transposed: bool, device: str = "cpu") -> Weight:
    """The weight `[N, K]` as stored, every value checked: its rows on demand, or the whole of it where it lies
    transposed (Conv1D) or goes to another device. Raises `CheckpointError` on NaN or Inf."""
    file = source.file_of(tensor)
    what = f"{file.path}: tensor {tensor!r}"
    if transposed or device != "cpu":
        weight = file.read(tensor)
        check_finite(weight, what)
        return (weight.T if transposed else weight).to(device)
    stored = StoredWeight(file, tensor)
    for rows in row_slabs(*stored.shape, FINITE_SLAB):
        check_finite(stored[rows], what, rows.start)
    return stored


def check_finite(tensor: Tensor, what: str, first: int = 0) -> None:
    """Raise `CheckpointError` naming `what` and the first NaN or Inf of a floating tensor `[N, K]` or `[n]`.

    first: position of the first element, or row, in the whole, where the tensor is a part of something larger.
    """
    rows = tensor.view(1, -1) if tensor.ndim == 1 else tensor
    for slab in row_slabs(len(rows), rows.shape[-1], FINITE_SLAB):
        bad = ~torch.isfinite(rows[slab])
        if bad.any():
            n, k = bad.nonzero()[0].tolist()
            where = f"element {first + k}" if tensor.ndim == 1 else f"row {first + n + slab.start}, column {k}"
            raise CheckpointError(
                f"{what} holds NaN or Inf (first in {where}); the checkpoint is damaged or its training diverged, "
                "download it again or repair that tensor"
            )


def quantize_layer(source: CheckpointFolder, layer: LayerPlan, device: str) -> tuple[LayerResult, QuantizedWeight]:
    """Read, quantize and measure one layer. Its record and the quantizer's slabs are in memory."""
    start = time.perf_counter()
    weight = read_weight(source, layer.tensor, layer.transposed, device)
    try:
        with smaller_slabs(slab_elements(source)):
            return_free_memory()
            record = quantize(weight, layer.config)
            return_free_memory()
            squared_error, squared_weight = weight_error(weight, record)
            return_free_memory()
    except (ArgumentError, FormatError) as error:
        raise CheckpointError(f"tensor {layer.tensor!r}: {error}") from None
    result = LayerResult(
        module=layer.module,
        tensor=layer.tensor,
        shape=(layer.out_features, layer.in_features),
        layout=record.layout.to_dict(),
        bits_per_weight=record.bits_per_weight,
        nbytes=record.nbytes,
        squared_error=squared_error,
        squared_weight=squared_weight,
        seconds=round(time.perf_counter() - start, 4),
    )
    return result, record.to("cpu")


def piece_path(folder: Path, layer: LayerPlan) -> Path:
    """The file that keeps the finished record of `layer`."""
    return folder / f"{hashlib.sha256(layer.module.encode()).hexdigest()[:24]}.safetensors"


def _data_digest(chunks: Iterator[memoryview]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def write_piece(path: Path, result: LayerResult, record: QuantizedWeight) -> None:
    """Keep a finished record, with its result and the sha256 of its tensors."""
    tensors = {name: tensor.contiguous() for name, tensor in record.state_dict().items()}
    metadata = {
        "result": json.dumps(result.to_dict()),
        "sha256": _data_digest(tensor_bytes(tensors[name]) for name in sorted(tensors)),
    }
    with atomic_writer(path) as handle:
        write_safetensors(handle, [OutputTensor.of(name, tensor) for name, tensor in tensors.items()], metadata)


def read_piece(path: Path, layer: LayerPlan) -> LayerResult | None:
    """The result of a kept record, or None when there is none that is whole and of this layer."""
    if not path.is_file():
        return None
    try:
        file = SafetensorsFile(path)
        result = LayerResult.from_dict(json.loads(file.metadata["result"]))
    except (CheckpointError, KeyError, ValueError, TypeError):
        return None
    digest = _data_digest(chunk for name in sorted(file.entries) for chunk in file.chunks(name))
    return result if result.is_of(layer) and digest == file.metadata.get("sha256") else None


def piece_outputs(path: Path, module: str) -> list[OutputTensor]:
    """The tensors of a kept record under the names they have in the checkpoint, read when they are due."""
    file = SafetensorsFile(path)

    def output(name: str) -> OutputTensor:
        entry = file.entries[name]
        return OutputTensor(f"{module}.{name}", entry.dtype, entry.shape, lambda: file.chunks(name))

    return [output(name) for name in sorted(file.entries)]


def copied_output(file: SafetensorsFile, tensor: str, name: str) -> OutputTensor:
    """A tensor of SRC that is copied bit by bit; a parameter with NaN or Inf is refused while it passes."""
    entry = file.entries[tensor]
    checked = entry.dtype in FLOATS and tensor.endswith((".weight", ".bias"))

    def chunks() -> Iterator[memoryview]:
        first = 0
        for chunk in file.chunks(tensor):
            if checked:
                values = torch.frombuffer(chunk, dtype=TORCH_DTYPES[entry.dtype])
                check_finite(values, f"{file.path}: tensor {tensor!r}", first)
                first += len(values)
            yield chunk

    return OutputTensor(name, entry.dtype, entry.shape, chunks)


def load_record(folder: CheckpointFolder, module: str, format_name: str) -> QuantizedWeight:
    """The record of `module` in a quantized checkpoint, shapes and dtypes checked, values not yet.

    Raises `CheckpointError` when tensors are missing or `FormatError` when they do not form a weight.
    """
    state = {}
    for name in ("header", *RECORD_TENSORS):
        full = f"{module}.{name}"
        if full in folder.where:
            state[name] = folder.file_of(full).read(full)
    if not state:
        raise CheckpointError(f"{folder.folder}: no tensors of layer {module!r}; quantize the model again")
    try:
        weight_class = FORMATS[format_name]
        return weight_class(weight_class.layout_from_state(state), state)
    except FormatError as error:
        raise FormatError(f"{folder.folder}: layer {module!r}: {error}; quantize or download the model again") from None


RECORD_TENSORS = (
    "codes",
    "scales",
    "offsets",
    "zeros",
    "ratios",
    "codebooks",
    *(f"{name}_{bits}" for bits in range(1, 8) for name in ("scales", "offsets")),
)
"""Every tensor that a record of either format may have beside its header."""
