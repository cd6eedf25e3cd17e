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

PANEL_BYTES = 32 << 20
"""Most bytes of dequantized weight at a time: less than the L2 cache of an H100, where the matmul then finds it."""

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

    found = None if INTERPRETED else tuned.find(task, tuned.device_name(device))
    return list(found or config.candidates(task, device_of(device))[0])


def forget() -> None:
    """Have configurations looked up again, and the file of tuned ones read again."""
    from ..kernels import tuned

    tuned.forget()
    _config.cache_clear()


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Kernels start on the current device: make x's that one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _dequantized_linear(x: Tensor, bias: Tensor | None, out_features: int, rows: object) -> Tensor:
    """x `[M, K]` times W made panel by panel; rows(begin, end) returns W[begin:end] in x's dtype."""
    assert callable(rows)
    panel = max(1, PANEL_BYTES // (x.shape[1] * x.element_size()))
    with torch.autocast(x.device.type, enabled=False):
        if panel >= out_features:
            return torch.nn.functional.linear(x, rows(0, out_features), bias)
        y = x.new_empty(x.shape[0], out_features)
        for begin in range(0, out_features, panel):
            end = min(out_features, begin + panel)
            part = None if bias is None else bias[begin:end]
            y[:, begin:end] = torch.nn.functional.linear(x, rows(begin, end), part)
    return y


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
    from ..kernels.config import Task

    out_features, in_features, launch = codes.shape[1], x.shape[-1], _launch()
    flat = x.reshape(-1, in_features).contiguous()
    given = [None if t is None else t.contiguous() for t in (codes, scales, offsets, zeros, ratios, bias)]
    shape = (*x.shape[:-1], out_features)
    if not flat.shape[0]:
        return x.new_empty(shape)
    group_size = min(group_size, in_features)
    with _on(x):
        if algorithm == "dequantize":

            def rows(begin: int, end: int) -> Tensor:
                where = (in_features, group_size, scale_kind, begin, end, x.dtype)
                found: Tensor = launch.bcq_dequantize(*given[:5], *where)
                return found

            return _dequantized_linear(flat, given[5], out_features, rows).view(shape)
        units = launch.group_units(in_features, group_size, launch.WORD)
        sizes = (flat.shape[0], out_features, in_features, codes.shape[0], launch.WORD, units, x.element_size())
        config = _config(Task(algorithm, *sizes), x.device.index)
        y: Tensor = launch.bcq_linear(flat, *given, group_size, scale_kind, algorithm, config)
    return y.view(shape)


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
    from ..kernels.config import Task

    out_features, in_features, launch = codes.shape[1], x.shape[-1], _launch()
    books, entries, vec_len = codebooks.shape
    flat = x.reshape(-1, in_features).contiguous()
    record = (codes.contiguous(), codebooks.contiguous(), scales.contiguous())
    bias = None if bias is None else bias.contiguous()
    shape = (*x.shape[:-1], out_features)
    if not flat.shape[0]:
        return x.new_empty(shape)
    group_size = min(group_size, in_features)
    with _on(x):
        if algorithm == "dequantize":

            def rows(begin: int, end: int) -> Tensor:
                found: Tensor = launch.codebook_dequantize(*record, in_features, group_size, begin, end, x.dtype)
                return found

            return _dequantized_linear(flat, bias, out_features, rows).view(shape)
        units = launch.group_units(in_features, group_size, vec_len)
        sizes = (flat.shape[0], out_features, in_features, books, vec_len, units, x.element_size(), entries)
        config = _config(Task(algorithm, *sizes), x.device.index)
        y: Tensor = launch.codebook_linear(flat, *record, bias, group_size, algorithm, config)
    return y.view(shape)


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
