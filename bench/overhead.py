"""What a call costs around its kernel: a `BCQLinear` beside the C++ operator on the same, prepared arguments; and what
`lutgemm.fuse` saves of three of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lutgemm.backends import cpu, forget_choices
from lutgemm.errors import BackendError
from lutgemm.fusion import FUSED_GROUPS, fuse
from lutgemm.nn import BCQLinear
from lutgemm.testing.timing import Call, Timing, time_interleaved, torch_threads

from .shapes import BCQ, Shape

SHAPES: tuple[Shape, ...] = ((64, 64), (1024, 1024))


@dataclass(frozen=True)
class OverheadRecord:
    """Microseconds with one token, one thread, weights in the caches, without gradients; all timed in turns."""

    N: int
    K: int
    bits: int
    forward: Timing
    """a call of a `BCQLinear`"""
    kernel: Timing
    """the operator that it ends in, called with the arguments that it was given"""
    torch_linear: Timing
    """`torch.nn.functional.linear` in fp32, for comparison"""
    apart: Timing
    """three such layers on the same activations, as q, k and v are"""
    fused: Timing
    """the same three after `lutgemm.fuse`"""

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

    forget_choices()  # a call that is kept ready does not ask for its operator
    with patch.object(cpu, "_op", noting):
        layer(x)
    forget_choices()
    if not seen:
        raise BackendError("overhead: forward called no kernel of the cpu backend; `lutgemm env` may say why")
    return seen[-1]


def call_each(layers: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    """The results of all layers for the same activations."""
    return [layer(x) for layer in layers]


def measure(seconds: float, shapes: Sequence[Shape] = SHAPES) -> list[OverheadRecord]:
    """One record per shape, each measured for `seconds`. Raises `BackendError` without the compiled kernels."""
    records = []
    with torch_threads(1), torch.no_grad():
        for n, k in shapes:
            case = replace(BCQ, N=n, K=k, group_size=min(k, BCQ.group_size))
            inputs = case.inputs()
            layer, dense = BCQLinear.from_weight(inputs.weight), torch.randn(n, k)
            layer(inputs.x)
            kernel = kernel_call(layer, inputs.x)
            assert torch.equal(kernel(), layer(inputs.x))
            names, weights = FUSED_GROUPS[0], [replace(case, seed=seed).weight() for seed in range(3)]
            apart, fused = (
                nn.ModuleDict({name: BCQLinear.from_weight(w) for name, w in zip(names, weights, strict=True)})
                for _ in range(2)
            )
            fuse(fused, [names])
            calls: dict[str, list[Call]] = {
                "forward": [partial(layer, inputs.x)],
                "kernel": [kernel],
                "torch_linear": [partial(torch.nn.functional.linear, inputs.x, dense)],
                "apart": [partial(call_each, list(apart.values()), inputs.x)],
                "fused": [partial(call_each, list(fused.values()), inputs.x)],
            }
            records.append(OverheadRecord(n, k, case.bits, **time_interleaved(calls, seconds)))
    return records


def table(records: Sequence[OverheadRecord]) -> str:
    """The records as text."""
    lines = ["N x K      bits  forward us  kernel us  overhead us  torch linear us  three apart us  three fused us"]
    for r in records:
        times = f"{r.forward.median_us:10.2f}  {r.kernel.median_us:9.2f}  {r.overhead_us:11.2f}"
        three = f"{r.apart.median_us:14.2f}  {r.fused.median_us:14.2f}"
        lines.append(f"{f'{r.N}x{r.K}':<10} {r.bits:<4}  {times}  {r.torch_linear.median_us:15.2f}  {three}")
    return "\n".join(lines)
