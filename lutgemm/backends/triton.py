"""The Triton backend: the kernels of `kernels/triton` (imported as `lutgemm.kernels`) behind the ops.

On GPUs of NVIDIA and AMD, compiled at first use. With `TRITON_INTERPRET=1` Triton's interpreter runs them on CPU
tensors, slowly: for tests and for reading along; "auto" then prefers any other backend.

`kernels/triton` reads the stored tensors as they are: no second copy of a weight is made or kept.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import Backend, Problem, Reason

if TYPE_CHECKING:
    from ..kernels.config import Device, Task

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
"""Triton decides this when a kernel is defined, so a later change of the variable changes nothing."""

MAX_TABLE_TOKENS = {"lut_gemm": 1, "biqgemm": 8, "codegemm": 4}
"""M up to which "auto" takes a table algorithm. Work on tables grows with M where tensor cores stand idle below 16
tokens; by count of issue slots the lines cross between 8 and 16 (BCQ) and 4 and 8 (codebooks). Not measured."""
MAX_FUSED_TOKENS = 512
"""M up to which "auto" takes `dequant_gemm`: each block of tokens decodes W again, a panel for cuBLAS is decoded once.
Not measured."""


@cache
def missing() -> Reason | None:
    """Why the kernels cannot be imported here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'lutgemm[triton]'"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "triton is not an installed package (no version); pip install 'lutgemm[triton]'"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}; pip install --upgrade triton"
    if importlib.util.find_spec("lutgemm.kernels") is None:
        return "lutgemm.kernels is not installed: a checkout on the path hides it; pip install -e . makes both one"
    return None


@lru_cache(maxsize=1)
def _unavailable() -> Reason | None:
    if reason := missing():
        return reason
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"this GPU has compute capability {found}, the kernels need 8.0"
    return None


@cache
def _launch() -> ModuleType:
    """The operators, imported at first use: that takes a second."""
    from ..kernels import launch

    return launch


@lru_cache(maxsize=64)
def device_of(index: int | None) -> Device:
    """What a configuration depends on, for the GPU of this index."""
    from ..kernels.config import Device

    if INTERPRETED or index is None:
        return Device(interpreted=INTERPRETED)
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Device(properties.multi_processor_count, properties.warp_size, shared)


@lru_cache(maxsize=4096)
def _config(task: Task, device: int | None) -> list[int]:
    """The configuration of a call: a tuned one, else the candidate that the model calls cheapest."""
    from ..kernels import config, tuned

    if task.algorithm == "dequantize":
        return []
    found = None if INTERPRETED else tuned.find(task, tuned.device_name(device))
    return list(found or config.candidates(task, device_of(device))[0])


def task_of(problem: Problem, algorithm: str) -> Task:
    """A call of `problem` as the kernels see it."""
    from ..kernels import config

    size = problem.dtype.itemsize
    if problem.op == "bcq_linear":
        return config.bcq_task(algorithm, *problem[3:6], problem.planes, problem.group_size, size)
    codebooks = (problem.planes, 1 << problem.codebook_bits, problem.vec_len)
    return config.codebook_task(algorithm, *problem[3:6], codebooks, problem.group_size, size)


def plan(problem: Problem, algorithm: str, device: int | None) -> tuple[list[int], bool]:
    """The configuration of a call on the GPU of this index, and whether its tokens are all computed at once."""
    task = task_of(problem, algorithm)
    config = _config(task, device)
    tokens = _launch().tokens_at_once(task, config)
    return config, tokens is None or tokens >= problem.M


def forget() -> None:
    """Have configurations looked up again, and the file of tuned ones read again."""
    from ..kernels import tuned

    tuned.forget()
    _config.cache_clear()


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Kernels start on the current device: make x's that one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _bcq_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    ratios: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    scale_kind: str,
    algorithm: str,
    accuracy: int,
) -> Tensor:
    launch, k = _launch(), x.shape[-1]
    (bits, n, _), group_size = codes.shape, min(group_size, k)
    flat = x.reshape(-1, k).contiguous()
    given = [None if t is None else t.contiguous() for t in (codes, scales, offsets, zeros, ratios, bias)]
    if not flat.shape[0]:
        return x.new_empty(*x.shape[:-1], n)
    task = launch.bcq_task(algorithm, flat.shape[0], n, k, bits, group_size, x.element_size())
    with _on(x):
        y: Tensor = launch.bcq_linear(flat, *given, group_size, scale_kind, algorithm, _config(task, x.device.index))
    return y.view(*x.shape[:-1], n)


def _codebook_linear(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    algorithm: str,
    accuracy: int,
) -> Tensor:
    launch, k = _launch(), x.shape[-1]
    n, group_size = codes.shape[1], min(group_size, k)
    flat = x.reshape(-1, k).contiguous()
    given = [None if t is None else t.contiguous() for t in (codes, codebooks, scales, bias)]
    if not flat.shape[0]:
        return x.new_empty(*x.shape[:-1], n)
    task = launch.codebook_task(algorithm, flat.shape[0], n, k, tuple(codebooks.shape), group_size, x.element_size())
    with _on(x):
        y: Tensor = launch.codebook_linear(flat, *given, group_size, algorithm, _config(task, x.device.index))
    return y.view(*x.shape[:-1], n)


def _unsupported(problem: Problem, algorithm: str) -> Reason | None:
    if algorithm == "codegemm":
        entries = -(-problem.K // problem.vec_len) * problem.planes << problem.codebook_bits
        if entries >= 2**31:
            return f"the Psumbook of one token would have {entries} entries, more than codegemm's kernel can index"
    return None


def _choose(problem: Problem) -> str:
    tables = ("lut_gemm", "biqgemm") if problem.op == "bcq_linear" else ("codegemm",)
    for algorithm in tables:
        if MAX_TABLE_TOKENS[algorithm] >= problem.M:
            return algorithm
    if problem.dtype == torch.float32 or problem.M > MAX_FUSED_TOKENS:
        return "dequantize"
    return "dequant_gemm"


BACKEND = Backend(
    name="triton",
    device_types=("cuda", "cpu") if INTERPRETED else ("cuda",),
    algorithms={
        "bcq_linear": ("lut_gemm", "biqgemm", "dequant_gemm", "dequantize"),
        "codebook_linear": ("codegemm", "dequant_gemm", "dequantize"),
    },
    unavailable=_unavailable,
    unsupported=_unsupported,
    choose=_choose,
    bcq_linear=_bcq_linear,
    codebook_linear=_codebook_linear,
)
