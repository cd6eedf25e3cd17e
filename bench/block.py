"""All linear layers of one transformer block, one after another, beside the same layers in torch.

Layers that read the same activations are one, as a server stacks them: q, k and v; gate and up. Each call is a whole
block with one token; on a GPU the calls of all copies lie in one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lutgemm.accuracy import DEFAULT
from lutgemm.errors import BackendError
from lutgemm.formats import QuantizedWeight
from lutgemm.ops import linear
from lutgemm.testing.cases import OpCase
from lutgemm.testing.numerics import exact_result, relative_error
from lutgemm.testing.timing import (
    Call,
    Timing,
    cold_bytes,
    cold_copies,
    time_interleaved,
    time_interleaved_cuda,
    torch_threads,
)

from .layer import failures
from .shapes import BCQ, CODEBOOK, Shape

BLOCKS: dict[str, tuple[Shape, ...]] = {
    "llama-3.1-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "smollm2-135m": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
}
"""Model -> (N, K) of qkv, o, gate + up, down."""

WEIGHTS: dict[str, OpCase] = {
    "bcq 2-bit": replace(BCQ, bits=2),
    "bcq 3-bit": replace(BCQ, bits=3),
    "bcq 4-bit": replace(BCQ, bits=4),
    "codebook 1x4x8": CODEBOOK,
    "codebook 2x8x8": replace(CODEBOOK, num_codebooks=2, vec_len=8),
}


@dataclass(frozen=True)
class BlockRecord:
    """One way to run a block. us: of the whole block."""

    model: str
    weights: str
    dtype: str
    nbytes: int
    """of all its weights, as stored"""
    error: float | None
    """relative L2 error against fp64, the greatest of its layers; None where a call raised an error"""
    correct: bool
    timing: Timing | None
    speedup: float | None
    """time of torch's layers of that dtype over this one"""
    message: str = ""
    """the error that a call raised"""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _group_size(shape: Shape) -> int:
    """The usual 128, or 64 where K is small."""
    return 128 if shape[1] % 128 == 0 else 64


def _run_all(calls: Sequence[Callable[[], Tensor]]) -> None:
    for call in calls:
        call()


def _bound(dtype: torch.dtype) -> float:
    """What the default accuracy allows, or one rounding of the result where that is more."""
    return max(1e-3, 2 * torch.finfo(dtype).eps)


def measure(
    model: str, seconds: float, device: str = "cpu", dtype: torch.dtype = torch.float32, threads: int = 1
) -> list[BlockRecord]:
    """A record of torch and one of each of `WEIGHTS`, cold, timed in turns; what is wrong has no time."""
    shapes = BLOCKS[model]
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(1, k, generator=generator).to(device, dtype) for _, k in shapes]
    calls: dict[str, list[Call]] = {}
    sizes: dict[str, int] = {}
    errors: dict[str, float | None] = {}
    messages: dict[str, str] = {}

    dense = [(torch.randn(n, k, generator=generator) / k**0.5).to(device, dtype) for n, k in shapes]
    sizes["torch"], errors["torch"] = sum(weight.nbytes for weight in dense), 0.0
    copies = [[w.clone() for w in dense] for _ in range(cold_copies(sizes["torch"], cold_bytes(device)))]
    calls["torch"] = [
        partial(_run_all, [partial(torch.nn.functional.linear, *p) for p in zip(x, c, strict=True)]) for c in copies
    ]
    with torch_threads(threads), torch.inference_mode(False), torch.no_grad():
        for name, base in WEIGHTS.items():
            cases = [replace(base, N=n, K=k, group_size=_group_size((n, k)), accuracy=DEFAULT) for n, k in shapes]
            weights = [case.weight().to(device) for case in cases]
            truths = [exact_result(*pair) for pair in zip(x, weights, strict=True)]
            sizes[name] = sum(weight.nbytes for weight in weights)
            worst = None
            try:
                with failures(name):
                    worst = max(relative_error(linear(a, w), t) for a, w, t in zip(x, weights, truths, strict=True))
            except BackendError as error:
                messages[name] = str(error)
            errors[name] = worst
            if worst is not None and worst <= _bound(dtype):
                held = [weights] + [
                    [_clone(weight) for weight in weights]
                    for _ in range(cold_copies(sizes[name], cold_bytes(device)) - 1)
                ]
                calls[name] = [
                    partial(_run_all, [partial(linear, *pair) for pair in zip(x, c, strict=True)]) for c in held
                ]
        clock = time_interleaved if torch.device(device).type == "cpu" else time_interleaved_cuda
        timings = clock(calls, seconds)
    base_us = timings["torch"].median_us
    return [
        BlockRecord(
            model=model,
            weights=name,
            dtype=str(dtype).removeprefix("torch."),
            nbytes=size,
            error=errors[name],
            correct=name in timings,
            timing=timings.get(name),
            speedup=base_us / timings[name].median_us if name in timings else None,
            message=messages.get(name, ""),
        )
        for name, size in sizes.items()
    ]


def _clone(weight: QuantizedWeight) -> QuantizedWeight:
    return type(weight)(weight.layout, {name: t.clone() for name, t in weight.tensors.items()})


def table(records: Sequence[BlockRecord]) -> str:
    """The records as text."""
    lines = ["block         weights         dtype     MB      us       p10-p90          x torch  error    ok"]
    for r in records:
        times = (
            f"{r.timing.median_us:8.1f} {r.timing.p10_us:8.1f}-{r.timing.p90_us:<8.1f}" if r.timing else f"{'-':>26}"
        )
        faster = f"{r.speedup:7.2f}" if r.speedup else f"{'-':>7}"
        error = f"{'-':<7}" if r.error is None else f"{r.error:.1e}"
        line = f"{r.model:<13} {r.weights:<15} {r.dtype:<8} {r.nbytes / 1e6:6.1f} {times} {faster}  {error}  "
        lines.append(f"{line}{'yes' if r.correct else 'WRONG'} {r.message}".rstrip())
    return "\n".join(lines)
