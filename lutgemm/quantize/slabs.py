"""How a weight is cut into work: argument checks, row slabs in fp32, and groups of equal length.

A weight `[N, K]` is read in slabs of whole rows of at most `SLAB_ELEMENTS` weights (at least one row), and a slab in
blocks of groups of one length: all full groups, then the shorter last ones. The weight as a whole is never copied, and
need not be in memory: `WeightRows` gives its rows when they are due.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..formats.base import MAX_FEATURES, dtype_name, row_slabs

SLAB_ELEMENTS = 1 << 18
"""Weights of one slab. The quantizers need about 100 bytes for each, some 25 MB, whatever the size of the layer;
slabs of this size stay in the second-level cache for the most part. Half of it costs up to a fifth of the speed."""

_slab_limit: ContextVar[int] = ContextVar("slab_limit", default=SLAB_ELEMENTS)

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class WeightRows(ABC):
    """A weight `[N, K]` that is kept elsewhere, on a disk for one; the quantizers take it in place of a tensor."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """`[rows, K]` on `device`: a slice of step 1, or the rows that an int64 tensor `[n]` names, in its order."""


Weight = Tensor | WeightRows


@dataclass(frozen=True)
class Block:
    """Neighbouring groups of one length: columns `start .. stop` of W hold groups `first .. first + count`."""

    start: int
    stop: int
    first: int
    count: int

    @property
    def length(self) -> int:
        """Weights per group."""
        return (self.stop - self.start) // self.count

    @property
    def groups(self) -> slice:
        return slice(self.first, self.first + self.count)

    def split(self, slab: Tensor) -> Tensor:
        """fp32 `[rows, K]` -> contiguous `[rows * count, length]`."""
        return slab[:, self.start : self.stop].reshape(-1, self.length)


def column_blocks(in_features: int, group_size: int) -> list[Block]:
    """The full groups of a row, then the shorter last group, if any."""
    full, rest = divmod(in_features, group_size)
    blocks = [Block(0, full * group_size, 0, full)] if full else []
    if rest:
        blocks.append(Block(full * group_size, in_features, full, 1))
    return blocks


def slabs(out_features: int, in_features: int) -> Iterator[slice]:
    """Row slices of at most `SLAB_ELEMENTS` weights each, or what `smaller_slabs` says."""
    return row_slabs(out_features, in_features, min(SLAB_ELEMENTS, _slab_limit.get()))


@contextmanager
def smaller_slabs(elements: int) -> Iterator[None]:
    """Work in slabs of at most so many weights inside the block: less memory, less speed, the same results."""
    token = _slab_limit.set(elements)
    try:
        yield
    finally:
        _slab_limit.reset(token)


class _Guard(threading.local):
    """Whether the calling thread is inside `one_thread`; how many threads are, and torch's threads before the first."""

    inside = False
    lock = threading.Lock()
    count = 0
    before = 1


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Hold torch's CPU pool to one thread, for many short passes over a slab that fits a cache.

    More threads gain nothing there, and wait for each other after every pass: three layers of 1536 x 576 to 4 bits took
    0.5 s on one thread, and 6 s on two while another process kept one of the two cores busy.

    May be nested, and entered by several Python threads at once. torch keeps a count per thread, and gives a thread
    that is new to it the count set last; so a thread that finds 1 while others are inside leaves with theirs.
    """
    if device.type != "cpu" or _guard.inside:
        yield
        return
    with _Guard.lock:
        before = torch.get_num_threads()
        if not _Guard.count:
            _Guard.before = before
        elif before == 1:
            before = _Guard.before
        _Guard.count += 1
        torch.set_num_threads(1)
    _guard.inside = True
    try:
        yield
    finally:
        _guard.inside = False
        with _Guard.lock:
            _Guard.count -= 1
            torch.set_num_threads(before)


_guard = _Guard()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep an enclosing `torch.autocast` out: the quantizers choose the dtype of every step themselves."""
    with torch.autocast(device.type, enabled=False):
        yield


def check_weight(weight: Weight) -> tuple[int, int]:
    """(N, K) of a weight that can be quantized. Raises `ArgumentError` naming it; `read` checks values."""
    if not isinstance(weight, Tensor | WeightRows):
        raise ArgumentError(f"weight is a {type(weight).__name__}; pass a 2-D floating-point torch tensor [N, K]")
    if len(weight.shape) != 2 or not all(weight.shape):
        raise ArgumentError(f"weight has shape {list(weight.shape)}; pass a 2-D tensor [N, K] that is not empty")
    if weight.dtype not in FLOAT_DTYPES:
        names = [dtype_name(dtype) for dtype in FLOAT_DTYPES]
        raise ArgumentError(f"weight has dtype {dtype_name(weight.dtype)}; use one of {names}")
    if weight.device.type == "meta":
        raise ArgumentError("weight is on the meta device and holds no values; load it first")
    if max(weight.shape) > MAX_FEATURES:
        raise ArgumentError(f"weight has shape {list(weight.shape)}; N and K may be at most {MAX_FEATURES}")
    return weight.shape[0], weight.shape[1]


def read(weight: Weight, rows: slice | Tensor) -> Tensor:
    """Rows of the weight in fp32, given as a slice or by their numbers. Raises `ArgumentError` naming the first row of
    these that holds NaN, Inf or a number beyond fp32."""
    slab = weight[rows].detach().to(torch.float32)
    if not torch.isfinite(slab).all():
        bad = int((~torch.isfinite(slab)).any(-1).nonzero()[0])
        row = rows.start + bad if isinstance(rows, slice) else int(rows[bad])
        raise ArgumentError(f"weight holds NaN or Inf (first in row {row}); repair or exclude this layer")
    return slab


def check_hessian(hessian: Tensor | None, weight: Weight) -> Tensor | None:
    """The importance of each input, fp32 `[K]` with mean 1, from a `[K]` diagonal or a `[K, K]` Hessian (its diagonal).

    Raises `ArgumentError` unless it is finite and nonnegative. None when there is none, or it is zero everywhere.
    """
    if hessian is None:
        return None
    k = weight.shape[1]
    if not isinstance(hessian, Tensor) or tuple(hessian.shape) not in ((k,), (k, k)):
        shape = list(hessian.shape) if isinstance(hessian, Tensor) else type(hessian).__name__
        raise ArgumentError(f"hessian is {shape}; pass a tensor of shape [{k}] or [{k}, {k}], or None")
    diagonal = (hessian if hessian.ndim == 1 else hessian.diagonal()).detach().to(weight.device, torch.float64)
    if not torch.isfinite(diagonal).all() or (diagonal < 0).any():
        raise ArgumentError("hessian has a negative, NaN or infinite diagonal entry; it must be finite and nonnegative")
    largest = diagonal.max()
    if largest == 0:
        return None
    diagonal = diagonal / largest
    return (diagonal / diagonal.mean()).to(torch.float32)


def group_importance(importance: Tensor | None, block: Block, rows: int) -> Tensor | None:
    """`[K]` -> contiguous `[rows * count, length]` for the groups of a block; a group of zeros counts all alike."""
    if importance is None:
        return None
    own = importance[block.start : block.stop].view(block.count, block.length)
    own = torch.where((own == 0).all(-1, keepdim=True), torch.ones_like(own), own)
    return own.repeat(rows, 1)


def power_of_two(groups: Tensor) -> Tensor:
    """`[R, S]` -> `[R]`: a power of two of the size of each group's largest weight, so that dividing by it is exact."""
    largest = groups.abs().amax(-1)
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), torch.ones_like(largest))


@dataclass(frozen=True)
class Stored:
    """Rounding to what `dtype` stores, for groups measured in `unit` `[R]` (powers of two; see `power_of_two`)."""

    dtype: torch.dtype
    unit: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """values `[..., R]` -> the nearest stored numbers, in the same unit; Inf on overflow."""
        return self.expand(values).to(torch.float32) / self.unit

    def expand(self, values: Tensor) -> Tensor:
        """values `[..., R]` -> the stored numbers themselves, in `dtype`."""
        return (values * self.unit).to(self.dtype)

    def select(self, index: Tensor) -> Stored:
        return Stored(self.dtype, self.unit[index])

    @property
    def smallest(self) -> Tensor:
        """`[R]`: the smallest positive number that is stored (fp16: subnormal; else normal), in the unit."""
        info = torch.finfo(self.dtype)
        return info.smallest_normal * (info.eps if self.dtype == torch.float16 else 1.0) / self.unit


def check_stored(name: str, tensor: Tensor, scale_dtype: str) -> None:
    """Raise `ArgumentError` when a number of the result overflowed its dtype."""
    if not torch.isfinite(tensor).all():
        raise ArgumentError(
            f'scale_dtype="{scale_dtype}" overflows: the {name} of a group exceed {torch.finfo(tensor.dtype).max:g}; '
            'use scale_dtype="float32"'
        )
