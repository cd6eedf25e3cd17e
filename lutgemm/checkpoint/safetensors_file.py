"""safetensors files by plain reads and writes: strict header checks, no memory map (whose pages would count as RSS).

Layout of a file: u64 little-endian header length, JSON header, then the tensors back to back.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from .json_file import parse_object

MAX_HEADER = 100_000_000
"""Largest header in bytes, the limit of the safetensors library too."""

CHUNK = 2 << 20
"""Bytes copied at a time: large enough for full disk speed, small beside any tensor that matters. A multiple of 8, so
that no element is cut in two."""

MAPPED_BYTES = 4 << 20
"""Buffers from this size on are mapped on their own."""

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of an element of every dtype that the safetensors format names."""

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that are read as tensors; the others are only ever copied as bytes."""

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
REMEDY = "the file is damaged or not a safetensors file; download or copy it again"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: dtype as safetensors names it, shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def _buffer(nbytes: int) -> bytearray | mmap.mmap:
    """Memory to read into. A large one is mapped on its own and goes back to the system when it is released; malloc
    would raise its thresholds to that size, and from then on keep as much free memory as that."""
    return mmap.mmap(-1, nbytes) if nbytes >= MAPPED_BYTES else bytearray(nbytes)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _parse_entry(what: str, entry: Any, data_start: int, data_size: int) -> TensorEntry:
    """The entry of one tensor, checked on its own. Raises `CheckpointError`."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what}: header entry must hold dtype, shape and data_offsets; {REMEDY}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{what}: dtype {dtype!r} is unknown; accepted are {sorted(BITS)}; {REMEDY}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(_is_size(n) for n in shape):
        raise CheckpointError(f"{what}: shape {str(shape)[:80]} is not a list of sizes >= 0; {REMEDY}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise CheckpointError(f"{what}: data_offsets {str(offsets)[:80]} are not two sizes >= 0; {REMEDY}")
    begin, end = offsets
    if begin > end or end > data_size:
        raise CheckpointError(
            f"{what}: data_offsets [{begin}, {end}] reach outside the file's {data_size} bytes of data (truncated?); "
            f"{REMEDY}"
        )
    if math.prod(shape) * BITS[dtype] != 8 * (end - begin):
        raise CheckpointError(f"{what}: {dtype} {shape} does not take the {end - begin} bytes of its offsets; {REMEDY}")
    return TensorEntry(dtype, tuple(shape), data_start + begin, end - begin)


class SafetensorsFile:
    """The header of a safetensors file, checked, and reads of parts of its tensors.

    Raises `CheckpointError` when the header is too large, is not JSON, or describes tensors that overlap, leave holes,
    have sizes that contradict their shapes, or reach outside the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as handle:
                self.size = handle.seek(0, 2)
                handle.seek(0)
                header, self.header_sha256 = self._read_header(handle)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check that the file is there") from None
        self.metadata = self._parse_metadata(header.pop("__metadata__", {}))
        self.entries: dict[str, TensorEntry] = self._parse_entries(header)

    def _read_header(self, handle: BinaryIO) -> tuple[dict[str, Any], str]:
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > self.size - 8:
            raise CheckpointError(f"{self.path}: header of {length} bytes in a file of {self.size} bytes; {REMEDY}")
        if length > MAX_HEADER:
            raise CheckpointError(f"{self.path}: header of {length} bytes, at most {MAX_HEADER} accepted; {REMEDY}")
        self.data_start = 8 + length
        raw = handle.read(length)
        return parse_object(raw, f"{self.path}: header", REMEDY), hashlib.sha256(raw).hexdigest()

    def _parse_metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{self.path}: header: __metadata__ must map names to text; {REMEDY}")
        return metadata

    def _parse_entries(self, header: dict[str, Any]) -> dict[str, TensorEntry]:
        entries = {}
        for name, entry in header.items():
            what = f"{self.path}: tensor {name[:200]!r}"
            try:
                name.encode()
            except UnicodeEncodeError:
                raise CheckpointError(f"{what}: the name is not valid Unicode; {REMEDY}") from None
            entries[name] = _parse_entry(what, entry, self.data_start, self.size - self.data_start)
        end = self.data_start
        for name, tensor in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if tensor.start != end:
                problem = "overlaps another tensor" if tensor.start < end else "leaves a hole before it"
                raise CheckpointError(f"{self.path}: tensor {name[:200]!r} {problem} in the file; {REMEDY}")
            end += tensor.nbytes
        if end != self.size:
            raise CheckpointError(f"{self.path}: {self.size - end} bytes after the last tensor; {REMEDY}")
        return entries

    def read_into(self, *pieces: tuple[memoryview, int]) -> None:
        """Fill each buffer from its file offset. Raises `CheckpointError` when the file has become shorter."""
        try:
            with self.path.open("rb", buffering=0) as handle:
                for view, start in pieces:
                    handle.seek(start)
                    done = 0
                    while done < len(view):
                        count = handle.readinto(view[done:])
                        if not count:
                            raise CheckpointError(f"{self.path}: ends early, it was {self.size} bytes; {REMEDY}")
                        done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None

    def _dtype(self, name: str) -> torch.dtype:
        entry = self.entries[name]
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {entry.dtype}; accepted are {sorted(TORCH_DTYPES)}"
            )
        return TORCH_DTYPES[entry.dtype]

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The tensor, or the given rows (first axis) of it, in memory of its own."""
        entry, dtype = self.entries[name], self._dtype(name)
        shape, start, nbytes = entry.shape, entry.start, entry.nbytes
        if rows != slice(None):
            first, last, _ = rows.indices(shape[0])
            stride = nbytes // max(1, shape[0])
            start, nbytes = start + first * stride, max(0, last - first) * stride
            shape = (max(0, last - first), *shape[1:])
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        buffer = _buffer(nbytes)
        self.read_into((memoryview(buffer), start))
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """The named rows (first axis), in the order given, in memory of their own."""
        entry, dtype = self.entries[name], self._dtype(name)
        stride = entry.nbytes // max(1, entry.shape[0])
        if not rows or not stride:
            return torch.empty((len(rows), *entry.shape[1:]), dtype=dtype)
        buffer = _buffer(len(rows) * stride)
        view = memoryview(buffer)
        places = (view[i * stride : (i + 1) * stride] for i in range(len(rows)))
        self.read_into(*((place, entry.start + row * stride) for place, row in zip(places, rows, strict=True)))
        return torch.frombuffer(buffer, dtype=dtype).view(len(rows), *entry.shape[1:])

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[memoryview]:
        """The tensor's bytes in order, `size` at a time; each view is valid until the next."""
        entry = self.entries[name]
        buffer = bytearray(min(size, entry.nbytes))
        for offset in range(0, entry.nbytes, size):
            view = memoryview(buffer)[: min(size, entry.nbytes - offset)]
            self.read_into((view, entry.start + offset))
            yield view


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, no copy; valid while the tensor lives."""
    count = tensor.numel() * tensor.element_size()
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("tensor_bytes needs a contiguous CPU tensor")
    return memoryview((ctypes.c_char * count).from_address(tensor.data_ptr())).cast("B") if count else memoryview(b"")


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write: its name, dtype (safetensors name), shape, and its bytes, produced when they are due."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> OutputTensor:
        """A tensor in memory."""
        owned = tensor.detach().to("cpu").contiguous()

        def chunks() -> Iterator[memoryview]:
            yield tensor_bytes(owned)

        return cls(name, DTYPE_NAMES[owned.dtype], tuple(owned.shape), chunks)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


def write_safetensors(
    handle: BinaryIO, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]
) -> tuple[int, str]:
    """Write a whole safetensors file; returns its size and sha256.

    Tensors are ordered by falling element size (stable), and the header is padded to 8 bytes, so that every tensor is
    aligned to its elements.
    """
    ordered = sorted(tensors, key=lambda tensor: -BITS[tensor.dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256()
    size = 0

    def put(data: bytes | memoryview) -> None:
        nonlocal size
        handle.write(data)
        digest.update(data)
        size += len(data)

    put(len(raw).to_bytes(8, "little"))
    put(raw)
    for tensor in ordered:
        before = size
        for chunk in tensor.chunks():
            put(chunk)
        assert size - before == tensor.nbytes, tensor.name
    return size, digest.hexdigest()
