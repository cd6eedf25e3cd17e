"""Who computes a call: what `backends.select` says, kept with the weight where asking it takes time that counts."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .accuracy import resolve_accuracy
from .backends import Kernel, Problem, generation, select
from .backends.cpu import _forced_isa
from .backends.prepared import Ready
from .formats import BCQWeight, CodebookWeight, QuantizedWeight

FEW_TOKENS = 64
"""Up to this M the choice of a kernel is kept with the weight: there it is a noticeable part of a call."""

MOST_CHOICES = 256
"""That a weight keeps: one for each shape of x, dtype and setting that it was called with."""

held_isa = _forced_isa.get
"""The instruction set that `cpu.use_isa` holds calls to, or None."""


class Choice:
    """Who runs a call: the function of a backend and its last arguments; `ready`: what it would end in, if known."""

    __slots__ = ("accuracy", "algorithm", "get_ready", "kernel", "ready")

    def __init__(self, kernel: Kernel, algorithm: str, accuracy: int, get_ready: Callable[..., Ready | None]) -> None:
        self.kernel, self.algorithm, self.accuracy = kernel, algorithm, accuracy
        self.get_ready = get_ready
        self.ready: Ready | None = None


def _keep(x: Tensor, weight: QuantizedWeight, names: tuple[str, str, str], choice: Choice) -> Choice:
    """Keep a choice with the weight where time counts; `select` keeps the others."""
    if x.numel() <= FEW_TOKENS * weight.shape[1]:
        if len(weight.choices) >= MOST_CHOICES:
            weight.choices.clear()
        weight.choices[x.shape, x.dtype, names[0], names[1], names[2], generation[0], held_isa()] = choice
    return choice


def bcq_choice(x: Tensor, weight: BCQWeight, backend: str, algorithm: str, accuracy: str) -> Choice:
    """Who computes `bcq_linear` of x `[..., K]`; kept with the weight where M is small."""
    names = (backend, algorithm, accuracy)
    choice = new_bcq_choice(x, weight.codes, weight.group_size, weight.scale_kind, *names)
    return _keep(x, weight, names, choice)


def codebook_choice(x: Tensor, weight: CodebookWeight, backend: str, algorithm: str, accuracy: str) -> Choice:
    """Who computes `codebook_linear` of x `[..., K]`; kept with the weight where M is small."""
    names = (backend, algorithm, accuracy)
    choice = new_codebook_choice(x, weight.codes, weight.codebooks, weight.group_size, *names)
    return _keep(x, weight, names, choice)


def new_bcq_choice(
    x: Tensor, codes: Tensor, group_size: int, scale_kind: str, backend: str, algorithm: str, accuracy: str
) -> Choice:
    """Who computes `bcq_linear` of x `[..., K]`."""
    k = x.shape[-1]
    m = x.numel() // k
    bits, n = codes.shape[:2]
    level = resolve_accuracy(accuracy)
    problem = Problem("bcq_linear", x.device.type, x.dtype, m, n, k, group_size, bits, scale_kind, accuracy=level)
    chosen, name = select(problem, backend, algorithm, held_isa())
    return Choice(chosen.bcq_linear, name, level, chosen.bcq_ready)


def new_codebook_choice(
    x: Tensor, codes: Tensor, codebooks: Tensor, group_size: int, backend: str, algorithm: str, accuracy: str
) -> Choice:
    """Who computes `codebook_linear` of x `[..., K]`."""
    k = x.shape[-1]
    m = x.numel() // k
    num_codebooks, n = codes.shape[:2]
    vec_len, codebook_bits = codebooks.shape[2], codebooks.shape[1].bit_length() - 1
    level = resolve_accuracy(accuracy)
    shape = (m, n, k, group_size, num_codebooks)
    problem = Problem("codebook_linear", x.device.type, x.dtype, *shape, "", vec_len, codebook_bits, level)
    chosen, name = select(problem, backend, algorithm, held_isa())
    return Choice(chosen.codebook_linear, name, level, chosen.codebook_ready)
