"""What can be run: every registered backend, once for each instruction set that it can be held to."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from ..backends import cpu, registry
from .cases import OpCase


@dataclass(frozen=True)
class Target:
    """A backend, and the instruction set that it is held to ("" where it has no such choice)."""

    backend: str
    isa: str = ""

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.isa}" if self.isa else self.backend

    def algorithms(self, op: str) -> tuple[str, ...]:
        return registry()[self.backend].algorithms[op]

    def takes(self, case: OpCase, algorithm: str) -> bool:
        """Whether this algorithm of the backend does not refuse the case."""
        return registry()[self.backend].unsupported(case.problem(self.device), algorithm) is None

    def runs_on(self, device: str) -> bool:
        """Whether the backend takes tensors of this device type."""
        return not registry()[self.backend].device_types or device in registry()[self.backend].device_types

    @property
    def device(self) -> str:
        """Device type of the tensors that this target is tested with."""
        return "cpu" if self.runs_on("cpu") else registry()[self.backend].device_types[0]

    def active(self) -> AbstractContextManager[None]:
        """While entered, calls of this backend use this instruction set."""
        return cpu.use_isa(self.isa) if self.isa else nullcontext()


def isa_in_use() -> str:
    """The instruction set of CPU calls that are not held to another one; "" without compiled kernels."""
    found = cpu.available_isas()
    return os.environ.get(cpu.ISA_VARIABLE) or found[-1] if found else ""


def absent() -> dict[str, str]:
    """Backend -> why it cannot run here, for each that cannot."""
    reasons = {name: backend.unavailable() for name, backend in registry().items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def targets() -> list[Target]:
    """Every target that can run here."""
    found = []
    for name in registry().keys() - absent().keys():
        isas = cpu.available_isas() if name == cpu.BACKEND.name else ("",)
        found += [Target(name, isa) for isa in isas]
    order = list(registry())
    return sorted(found, key=lambda target: order.index(target.backend))
