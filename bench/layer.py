"""The form in which every baseline is handed over: what is asked for, and the prepared layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lutgemm.errors import BackendError, LutgemmError
from lutgemm.testing.timing import cold_bytes, cold_copies

GROUPS = (128, 64, 32)
"""Weights that share a scale in 4-bit and 2-bit baselines: the first that divides K."""


def usual_group(name: str, in_features: int) -> int:
    """The first of `GROUPS` that divides K. Raises `BackendError` when none does; `name` is the baseline's."""
    group = next((size for size in GROUPS if in_features % size == 0), None)
    if group is None:
        raise BackendError(f"{name} takes K a multiple of one of {list(GROUPS)} here, got K={in_features}")
    return group


@contextmanager
def failures(name: str) -> Iterator[None]:
    """Turns any error of what is measured into a `BackendError` that names it: other packages, compilers of kernels and
    drivers raise all kinds, and one that fails must not end a run of hundreds.
    """
    try:
        yield
    except LutgemmError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise BackendError(f"{name} failed: {type(error).__name__}: {reason[:300]}") from error


@lru_cache(maxsize=1)
def _weight(n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, k, generator=generator).div_(k**0.5).bfloat16().float()


@dataclass(frozen=True)
class Request:
    """A layer to prepare: N x K, for that many threads; cold: in copies that exceed the caches together."""

    N: int
    K: int
    cold: bool
    threads: int
    device: str = "cpu"

    def copies(self, nbytes: int) -> int:
        """How many copies of a weight of `nbytes` are called in turns."""
        return cold_copies(nbytes, cold_bytes(self.device)) if self.cold else 1

    def weight(self) -> Tensor:
        """fp32 `[N, K]`, normal, the same for the same shape, and exact in bf16. Not to be written to."""
        return _weight(self.N, self.K)


@dataclass(frozen=True)
class Layer:
    """A prepared layer. dense: the weight `[N, K]` that it multiplies by. nbytes: as stored, scales included.

    bind(x): x `[M, K]` -> one call per copy, each without arguments and giving y `[M, N]` (Tensor or NumPy array);
    raises `BackendError` for an x that it does not take.
    """

    dense: Callable[[], Tensor]
    nbytes: int
    bind: Callable[[Tensor], list[Callable[[], Any]]]
