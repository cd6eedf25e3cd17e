"""Who computes: the backends, what each can take, and the one place where a choice is made.

A backend states `unavailable()` (None, or why it cannot run here) and `unsupported(problem, algorithm)` (None, or why
it cannot take the problem). An explicit choice runs or raises with that reason; only "auto" falls back, and says so
once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..accuracy import AUTO, EXACT
from ..errors import ArgumentError, BackendError

if TYPE_CHECKING:
    from ..formats import BCQWeight, CodebookWeight
    from .prepared import Ready


class Problem(NamedTuple):
    """One call, as far as a choice depends on it. A tuple: one is made and hashed in every call."""

    op: str
    """"bcq_linear" or "codebook_linear"."""
    device: str
    """device type: "cpu", "cuda", ..."""
    dtype: torch.dtype
    """of x and y"""
    M: int
    N: int
    K: int
    group_size: int
    planes: int
    """bits of BCQ, num_codebooks of codebook weights"""
    scale_kind: str = ""
    """BCQ: "free", "uniform" or "ratio" """
    vec_len: int = 0
    codebook_bits: int = 0
    accuracy: int = EXACT
    """index in `accuracy.ACCURACIES`"""


Reason = str
Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class Backend:
    """A way to run every op. `algorithms[op]` names what it offers; `choose` picks one for "auto".

    `bcq_linear` and `codebook_linear` take what the torch op of that name does (x may have any shape `[..., K]`), but
    for its choices: after the weight come group_size, (BCQ) scale_kind, the algorithm's name, and accuracy as in
    `Problem`.
    """

    name: str
    device_types: tuple[str, ...]
    """() = any device"""
    algorithms: dict[str, tuple[str, ...]]
    unavailable: Callable[[], Reason | None]
    unsupported: Callable[[Problem, str], Reason | None]
    choose: Callable[[Problem], str]
    bcq_linear: Kernel
    codebook_linear: Kernel
    bcq_ready: Callable[[BCQWeight, str, int], Ready | None] = lambda *_: None
    """(weight, algorithm, accuracy) of a call of `bcq_linear` just made -> how to make it again without its ways round;
    None where there is no shorter way"""
    codebook_ready: Callable[[CodebookWeight, str, int], Ready | None] = lambda *_: None
    misconfigured: Callable[[], Reason | None] = lambda: None
    """why a setting of the user's for this backend cannot be obeyed: an error for "auto" too, on its device types"""


def _registry() -> dict[str, Backend]:
    from . import cpu, cuda, reference, triton

    compiled = (cpu.BACKEND, cuda.BACKEND, triton.BACKEND)
    return {backend.name: backend for backend in (*compiled, reference.BACKEND)}


@lru_cache(maxsize=1)
def registry() -> dict[str, Backend]:
    """Every backend by name, in the order in which "auto" tries them; `reference` is last and takes everything."""
    return _registry()


def backends() -> dict[str, str | None]:
    """Name of every backend -> None where it can run on this machine, else the reason why not."""
    return {name: backend.unavailable() for name, backend in registry().items()}


def _refusal(backend: Backend, problem: Problem, algorithm: str) -> Reason | None:
    if reason := backend.unavailable():
        return reason
    if backend.device_types and problem.device not in backend.device_types:
        return f"it runs on {' and '.join(backend.device_types)}, and x is on {problem.device}"
    offered = backend.algorithms[problem.op]
    if algorithm != AUTO and algorithm not in offered:
        return f"it offers the algorithms {list(offered)} for {problem.op}"
    return backend.unsupported(problem, algorithm if algorithm != AUTO else backend.choose(problem))


@lru_cache(maxsize=8192)
def select(problem: Problem, backend: str = AUTO, algorithm: str = AUTO, isa: int | None = None) -> tuple[Backend, str]:
    """The backend and algorithm that run `problem`; cached per problem.

    isa: what `cpu.use_isa` holds calls to, on which a choice depends; it is part of the key only.

    Raises `ArgumentError` for a name that nobody has, `BackendError` when an explicit choice cannot take the problem
    or a backend that would be asked has a setting that it cannot obey.
    """
    known = registry()
    if backend != AUTO and backend not in known:
        raise ArgumentError(f"backend={backend!r} is unknown; use {AUTO!r} or one of {list(known)}")
    names = sorted({name for b in known.values() for name in b.algorithms[problem.op]})
    if algorithm != AUTO and algorithm not in names:
        raise ArgumentError(f"algorithm={algorithm!r} is unknown for {problem.op}; use {AUTO!r} or one of {names}")

    refusals: dict[str, Reason] = {}
    for candidate in known.values() if backend == AUTO else [known[backend]]:
        if problem.device in candidate.device_types and (reason := candidate.misconfigured()):
            raise BackendError(reason)
        reason = _refusal(candidate, problem, algorithm)
        if reason is None:
            if refusals and candidate.name == "reference":
                meant = [name for name in refusals if problem.device in known[name].device_types]
                name = meant[0] if meant else next(iter(refusals))
                _warn_slow((name, refusals[name]))
            return candidate, candidate.choose(problem) if algorithm == AUTO else algorithm
        refusals[candidate.name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise BackendError(f"backend={backend!r}, algorithm={algorithm!r} cannot run {problem}: {reasons}")


generation = [0]
"""How often `forget_choices` was called: part of the key under which a choice is kept elsewhere."""


def forget_choices() -> None:
    """Let every call choose anew: after a change of the backends, their settings or their thresholds."""
    select.cache_clear()
    generation[0] += 1


@lru_cache(maxsize=64)
def _warn_slow(refusal: tuple[str, Reason]) -> None:
    name, reason = refusal
    warnings.warn(
        f"lutgemm runs on its slow PyTorch reference: backend {name!r} was passed over because {reason}. "
        "`lutgemm env` shows what this installation has.",
        RuntimeWarning,
        stacklevel=3,
    )
