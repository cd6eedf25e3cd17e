"""What a call costs around its kernel: `BCQLinear.forward` beside the C++ operator on the same, prepared arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lutgemm.backends import cpu
from lutgemm.errors import BackendError
from lutgemm.nn import BCQLinear
from lutgemm.testing.timing import Call, Timing, time_interleaved, torch_threads

from .shapes import BCQ, Shape

SHAPES: tuple[Shape, ...] = ((64, 64), (1024, 1024))


@dataclass(frozen=True)
class OverheadRecord:
    """Microseconds of one call with one token, one thread, weights in the caches; all three timed in turns."""

    N: int
    K: int
    bits: int
    forward: Timing
    """`BCQLinear.forward` in inference mode"""
    kernel: Timing
    """the operator that it ends in, called with the arguments that it was given"""
    torch_linear: Timing
    """`torch.nn.functional.linear` in fp32, for comparison"""

    @property
    def overhead_us(self) -> float:
        """Median of forward less that of the kernel."""
        return self.forward.median_us - self.kernel.median_us

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "overhead_us": self.overhead_us}


def kernel_call(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """The call of the C++ operator that `layer(x)` makes. Raises `BackendError` when it makes none."""
    operator, seen = cpu._op, []

    def noting(name: str) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            seen.append(partial(operator(name), *args))
            return seen[-1]()

        return call

    with patch.object(cpu, "_op", noting):
        layer(x)
    if not seen:
        raise BackendError("overhead: forward called no kernel of the cpu backend; `lutgemm env` may say why")
    return seen[-1]


def measure(seconds: float, shapes: Sequence[Shape] = SHAPES) -> list[OverheadRecord]:
    """One record per shape, each measured for `seconds`. Raises `BackendError` without the compiled kernels."""
    records = []
    with torch_threads(1), torch.inference_mode():
        for n, k in shapes:
            case = replace(BCQ, N=n, K=k, group_size=min(k, BCQ.group_size))
            inputs = case.inputs()
            layer, dense = BCQLinear.from_weight(inputs.weight), torch.randn(n, k)
            layer(inputs.x)
            kernel = kernel_call(layer, inputs.x)
            assert torch.equal(kernel(), layer(inputs.x))
            calls: dict[str, list[Call]] = {
                "forward": [partial(layer, inputs.x)],
                "kernel": [kernel],
                "torch_linear": [partial(torch.nn.functional.linear, inputs.x, dense)],
            }
            records.append(OverheadRecord(n, k, case.bits, **time_interleaved(calls, seconds)))
    return records


def table(records: Sequence[OverheadRecord]) -> str:
    """The records as text."""
    lines = ["N x K      bits  forward us  kernel us  overhead us  torch linear us"]
    for r in records:
        times = f"{r.forward.median_us:10.2f}  {r.kernel.median_us:9.2f}  {r.overhead_us:11.2f}"
        lines.append(f"{f'{r.N}x{r.K}':<10} {r.bits:<4}  {times}  {r.torch_linear.median_us:15.2f}")
    return "\n".join(lines)
