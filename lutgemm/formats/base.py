"""What every quantized weight shares: the record contract, tensor specs, and how groups are resolved."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentError, FormatError

FORMAT_VERSION = 1
"""Version of `SPEC.md` that this package reads and writes; the first word of every record's `header`."""

HEADER_WORDS = 8
"""Length of the int32 `header` tensor of both formats."""

SCALE_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""dtypes that scales, offsets and codebooks may be stored in, by their name in JSON."""

ROW_GROUP = "row"
"""`group_size` of a configuration that means: one group per row, whatever K of the layer is."""

MAX_FEATURES = 2**24
"""Largest N or K that is accepted: far above any model, small enough that no size overflows an int64."""


@dataclass(frozen=True)
class TensorSpec:
    """dtype and shape that one tensor of a record must have."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise `FormatError` unless `tensor` has this dtype and shape."""
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.shape:
            raise FormatError(
                f"{name}: got {dtype_name(tensor.dtype)} {list(tensor.shape)}, "
                f"expected {dtype_name(self.dtype)} {list(self.shape)}"
            )


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` -> `"float16"`."""
    return str(dtype).removeprefix("torch.")


def parse_scale_dtype(name: str, argument: str = "scale_dtype") -> torch.dtype:
    """The dtype called `name`. Raises `ArgumentError` naming `argument` when it is not one of `SCALE_DTYPES`."""
    try:
        return SCALE_DTYPES[name]
    except (KeyError, TypeError):
        raise ArgumentError(f"{argument}={name!r} is not supported; use one of {sorted(SCALE_DTYPES)}") from None


def check_int(argument: str, value: Any, low: int, high: int) -> int:
    """`value` when it is an int in [low, high]; otherwise `ArgumentError` naming `argument`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ArgumentError(f"{argument}={value!r} is not supported; use an integer from {low} to {high}")
    return value


def check_bool(argument: str, value: Any) -> bool:
    """`value` when it is a bool; otherwise `ArgumentError` naming `argument`."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{argument}={value!r} is not supported; use true or false")
    return value


def resolve_group_size(group_size: int | str, in_features: int, multiple: int) -> int:
    """`group_size` of a configuration -> the group size of a layer of K = `in_features`.

    `"row"` becomes K. A number must be a positive multiple of `multiple`, or K itself; it may exceed K (one group).
    """
    if group_size == ROW_GROUP:
        return in_features
    if (
        isinstance(group_size, bool)
        or not isinstance(group_size, int)
        or not 0 < group_size <= MAX_FEATURES
        or (group_size % multiple and group_size != in_features)
    ):
        raise ArgumentError(
            f"group_size={group_size!r} is not supported{f' for K={in_features}' if in_features > 0 else ''}; "
            f"use a positive multiple of {multiple}, or {ROW_GROUP!r} (= K)"
        )
    return group_size


def num_groups(in_features: int, group_size: int) -> int:
    """G = ceil(K / group_size)."""
    return -(-in_features // group_size)


def expand_groups(per_group: Tensor, in_features: int, group_size: int) -> Tensor:
    """`[..., G]` -> `[..., K]`: the value of the group that each k belongs to."""
    return per_group.repeat_interleave(min(group_size, in_features), dim=-1)[..., :in_features]


def row_slabs(rows: int, bytes_per_row: int, budget: int = 64 << 20) -> Iterator[slice]:
    """Slices that cover `rows` rows in order, each of at most `budget` bytes of working memory (at least one row)."""
    step = max(1, budget // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


L = TypeVar("L", bound="Layout")


class Layout(ABC):
    """Everything about a weight but its numbers: enough to allocate, to load, and to report its size."""

    format: ClassVar[str]
    out_features: int
    in_features: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def num_groups(self) -> int:
        return num_groups(self.in_features, self.group_size)

    @property
    def nbytes(self) -> int:
        """Stored bytes of one weight, the header left out."""
        return sum(spec.nbytes for name, spec in self.specs().items() if name != "header")

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / (N * K): codes as stored, with scales, offsets, zeros and codebooks counted."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    @abstractmethod
    def specs(self) -> dict[str, TensorSpec]:
        """Name -> dtype and shape of every tensor of the record, in storage order; `header` first."""

    @abstractmethod
    def header(self) -> Tensor:
        """The int32 `[8]` header of SPEC.md."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON form without N and K, so that one entry can serve many layers."""

    @classmethod
    def from_dict(cls: type[L], entry: Mapping[str, Any], out_features: int, in_features: int) -> L:
        """The layout of `to_dict` for a layer of N x K. Raises `ArgumentError` on a missing, unknown or bad field."""
        given = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.items() if key != "format"}
        own = [f for f in fields(cls) if f.name not in ("out_features", "in_features")]  # type: ignore[arg-type]
        known, required = {f.name for f in own}, {f.name for f in own if f.default is MISSING}
        if unknown := given.keys() - known:
            raise ArgumentError(f"{cls.format} layout: unknown fields {sorted(unknown)}; known are {sorted(known)}")
        if missing := required - given.keys():
            raise ArgumentError(f"{cls.format} layout: missing fields {sorted(missing)}")
        return cls(out_features=out_features, in_features=in_features, **given)  # type: ignore[call-arg]


W = TypeVar("W", bound="QuantizedWeight")


class QuantizedWeight(ABC):
    """A linear layer's weight W `[N, K]` in one of the formats of SPEC.md: its layout and its tensors.

    Records are immutable by convention: operations return new ones. `tensors` may alias a module's parameters.
    """

    format: ClassVar[str]

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        specs = layout.specs()
        missing, extra = specs.keys() - tensors.keys(), tensors.keys() - specs.keys()
        if missing or extra:
            raise FormatError(
                f"{self.format} weight: missing tensors {sorted(missing)}, unexpected tensors {sorted(extra)}"
            )
        for name, spec in specs.items():
            spec.check(f"{self.format} weight, {name}", tensors[name])
        self.layout = layout
        self.shape = layout.shape
        """(N, K)"""
        self.group_size = layout.group_size
        self.tensors: dict[str, Tensor] = {name: tensors[name] for name in specs}
        self.choices: dict[Any, Any] = {}
        """Who computes calls of few tokens, as `ops` found it: part of no copy."""

    @property
    def device(self) -> torch.device:
        return self.tensors["codes"].device

    @property
    def codes(self) -> Tensor:
        return self.tensors["codes"]

    @property
    def scales(self) -> Tensor:
        return self.tensors["scales"]

    @property
    def nbytes(self) -> int:
        """Stored bytes, the header left out."""
        return self.layout.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Average stored bits per weight, with scales, offsets, zeros and codebooks counted (SPEC.md, section 5)."""
        return self.layout.bits_per_weight

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by its name in a checkpoint (without a module prefix); `from_state_dict` takes it back."""
        return dict(self.tensors)

    @classmethod
    def from_state_dict(cls: type[W], state: Mapping[str, Tensor]) -> W:
        """The weight that `state_dict` described, every value checked.

        Raises `FormatError` when the header, a shape, a dtype or a value is not what SPEC.md allows.
        """
        weight = cls(cls.layout_from_state(state), state)
        weight.check_values()
        return weight

    def to(self: W, device: torch.device | str) -> W:
        """The same weight on another device. Its dtypes never change: they are part of the format."""
        return type(self)(self.layout, {name: t.to(device) for name, t in self.tensors.items()})

    def repack(self) -> None:
        """Make the next call prepare this weight for its kernels again.

        Kernels read a layout of their own, which the first call makes and which is kept while the tensors live. Changes
        in place are noticed; changes through `.data` or through memory shared outside of torch are not: call this then.
        """
        from ..backends import prepared

        prepared.forget(self.codes)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"choices": {}}

    def __repr__(self) -> str:
        n, k = self.shape
        return f"{type(self).__name__}({n}x{k}, {self.bits_per_weight:.2f} bits per weight, {self.layout.to_dict()})"

    @classmethod
    @abstractmethod
    def layout_from_state(cls, state: Mapping[str, Tensor]) -> Layout:
        """The layout that a header and the tensors beside it describe; `FormatError` when they contradict."""

    def check_values(self, names: Collection[str] | None = None) -> None:
        """Raise `FormatError` on what a shape cannot show: codes out of range, NaN or Inf, set padding bits.

        names: look at these tensors only.
        """
        checked = {name: t for name, t in self.tensors.items() if names is None or name in names}
        for name, tensor in checked.items():
            check_finite(self.format, name, tensor)
        if "header" in checked and not torch.equal(checked["header"].cpu(), self.layout.header()):
            raise FormatError(f"{self.format} weight: header {checked['header'].tolist()} contradicts its tensors")
        if "codes" in checked:
            self._check_codes()

    @abstractmethod
    def _check_codes(self) -> None:
        """Raise `FormatError` for codes out of range or with set padding bits."""

    @abstractmethod
    def _dequantize_rows(self, rows: slice) -> Tensor:
        """fp32 W[rows], computed in the order of SPEC.md."""

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        """W `[N, K]` (or the given rows of it), computed in fp32 in the order of SPEC.md, then cast to `dtype`.

        Working memory beyond the result is bounded: rows are taken in slabs.
        """
        start, stop, _ = rows.indices(self.shape[0])
        out = torch.empty(max(0, stop - start), self.shape[1], dtype=dtype, device=self.device)
        for slab in row_slabs(len(out), 16 * self.shape[1]):
            out[slab] = self._dequantize_rows(slice(start + slab.start, start + slab.stop)).to(dtype)
        return out


def read_header(state: Mapping[str, Tensor], format_name: str, format_id: int) -> list[int]:
    """The header words of `state`, its version and format checked, N and K within bounds."""
    header = state.get("header")
    if header is None:
        raise FormatError(f"{format_name} weight: missing tensor 'header'")
    TensorSpec(torch.int32, (HEADER_WORDS,)).check(f"{format_name} weight, header", header)
    words = [int(word) for word in header.tolist()]
    if words[0] != FORMAT_VERSION:
        raise FormatError(
            f"{format_name} weight: format version {words[0]} is unknown; this lutgemm reads version "
            f"{FORMAT_VERSION}. Install a newer lutgemm, or quantize the model again"
        )
    if words[1] != format_id:
        raise FormatError(f"{format_name} weight: header says format {words[1]}, expected {format_id}")
    for name, value in (("out_features", words[2]), ("in_features", words[3])):
        if not 0 < value <= MAX_FEATURES:
            raise FormatError(f"{format_name} weight: header says {name}={value}, accepted is 1 to {MAX_FEATURES}")
    return words


def check_finite(format_name: str, name: str, tensor: Tensor) -> None:
    """Raise `FormatError` when a floating tensor holds NaN or Inf."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise FormatError(f"{format_name} weight: {name} holds NaN or Inf; the file is damaged or was badly quantized")
