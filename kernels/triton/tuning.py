"""Fills the file of `tuned.py`: times the candidates of the layers that one is going to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import triton as backend
from ..errors import ArgumentError, BackendError
from ..formats import BCQWeight
from ..testing.cases import OpCase
from . import launch, tuned
from .config import TOKEN_CLASSES, Config, Task

Timer = Callable[[Callable[[], Tensor]], float]
Progress = Callable[[Sequence[Any]], Iterable[Any]]


def default_timer(call: Callable[[], Tensor]) -> float:
    """Median microseconds on the GPU, its L2 cache flushed before each call."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, return_mode="median"))


def tasks_of(case: OpCase, tokens: Iterable[int]) -> list[Task]:
    """What calls of a layer with so many tokens ask for, every algorithm with candidates at its M."""
    tables = [name for name in backend.BACKEND.algorithms[case.op] if name in backend.MAX_TABLE_TOKENS]
    problems = [case.problem("cuda")._replace(M=m) for m in tokens]
    few = [(p, name) for p in problems for name in tables if 2 * backend.MAX_TABLE_TOKENS[name] >= p.M]
    more = [(p, "dequant_gemm") for p in problems if 8 <= p.M <= backend.MAX_FUSED_TOKENS]
    return [backend.task_of(problem, name) for problem, name in few + more]


def _runner(case: OpCase, device: torch.device) -> Callable[[Task, Config], Tensor]:
    """Runs a task on a weight of this case with a configuration."""
    weight = case.weight().to(device)
    t = weight.tensors
    group_size = min(weight.group_size, case.K)

    xs: dict[int, Tensor] = {}

    def run(task: Task, config: Config) -> Tensor:
        if task.M not in xs:
            xs[task.M] = torch.randn(task.M, case.K).to(case.torch_dtype).to(device)
        x = xs[task.M]
        if isinstance(weight, BCQWeight):
            record = (t["codes"], t["scales"], t.get("offsets"), t.get("zeros"), t.get("ratios"))
            y: Tensor = launch.bcq_linear(x, *record, None, group_size, weight.scale_kind, task.algorithm, list(config))
            return y
        record = (t["codes"], t["codebooks"], t["scales"])
        y = launch.codebook_linear(x, *record, None, group_size, task.algorithm, list(config))
        return y

    return run


def tune_triton(
    layers: Sequence[OpCase],
    tokens: Sequence[int] = TOKEN_CLASSES,
    *,
    timer: Timer = default_timer,
    progress: Progress = iter,
    save: bool = True,
) -> tuned.Found:
    """Time candidates for calls of these layers on the current GPU; keep the fastest, for later calls too.

    Of a layer its op, N, K, format and dtype count. Returns configuration by problem class. progress: goes over the
    tasks and may tell how far. save: write the user's file. Raises `BackendError` where the kernels cannot run.
    """
    if reason := backend.BACKEND.unavailable():
        raise BackendError(f"there is nothing to measure, the Triton backend cannot run: {reason}")
    path = tuned.FILE.path()
    if save and path is None:
        raise ArgumentError("you have no home folder to keep results in; set XDG_CACHE_HOME to an absolute path")
    index = None if backend.INTERPRETED else torch.cuda.current_device()
    device = torch.device("cpu" if index is None else f"cuda:{index}")
    found: tuned.Found = {}
    plan = [(layer, task) for layer in layers for task in tasks_of(layer, tokens)]
    of_layer: OpCase | None = None
    for layer, task in progress(plan):
        if layer is not of_layer:
            of_layer, run = layer, _runner(layer, device)
        results = tuned.measure(task, backend.device_of(index), partial(run, task), timer)
        found |= tuned.best([(task, results)])
    if save and path is not None:
        tuned.save(path, tuned.device_name(index), found)
        backend.forget()
    return found
