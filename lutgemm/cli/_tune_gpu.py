"""`lutgemm tune` on GPUs: thresholds of the CUDA backend, and block sizes of the Triton backend."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm

from .. import tuning_gpu
from ..accuracy import ACCURACIES
from ..backends import Problem, cuda, triton, tuned_gpu
from ..backends.gpu_heuristics import GpuThreshold, choose_on_gpu
from ..backends.heuristics import NO_CROSSING
from ..errors import ArgumentError, BackendError
from ..testing.cases import OpCase
from ._tune_common import print_json, print_reset, say_written, with_bar, writable

TRITON_COMMAND = "lutgemm tune --backend triton"
TRITON_LAYERS = ("4096x4096", "6144x4096", "28672x4096", "4096x14336")
"""N x K of the layers of a model of 8 billion weights, queries, keys and values as one, and gate and up."""
TRITON_BITS = (2, 3, 4)
TRITON_CODEBOOKS = ((1, 4), (2, 8))
"""num_codebooks and vec_len."""

FULL = (tuning_gpu.SHAPES, tuning_gpu.TOKENS, tuning_gpu.SECONDS)
QUICK = (tuning_gpu.QUICK_SHAPES, tuning_gpu.QUICK_TOKENS, tuning_gpu.QUICK_SECONDS)
"""Shapes of the weights, tokens, seconds of timing."""


def device_index(device: str) -> int:
    """The GPU that "cuda" or "cuda:1" names. Raises `ArgumentError` where torch sees none, or not that one."""
    try:
        asked = torch.device(device)
    except RuntimeError:
        raise ArgumentError(f"device={device!r} is unknown; use cpu, cuda or cuda:N") from None
    if asked.type != "cuda":
        raise ArgumentError(f"device={device!r} cannot be tuned; use cpu, cuda or cuda:N")
    seen = torch.cuda.device_count()
    if not seen:
        raise ArgumentError(f"device={device!r}: torch sees no GPU; check the driver and CUDA_VISIBLE_DEVICES")
    index = torch.cuda.current_device() if asked.index is None else asked.index
    if index >= seen:
        raise ArgumentError(f"device={device!r}: torch sees {seen} GPU{'s' * (seen != 1)}; use cuda:0 to {seen - 1}")
    return index


def _segments(rows: tuple[GpuThreshold, ...], problem: Problem) -> list[tuple[str, int]]:
    """(algorithm, the last of the measured M at which it is taken) by rising M; the last one is for any M."""
    taken = []
    for m in tuning_gpu.TOKENS:
        asked = problem._replace(M=m)
        taken.append((choose_on_gpu(asked, cuda.BACKEND.algorithms[problem.op], cuda.BACKEND.unsupported, rows), m))
    found = [(algorithm, max(m for _, m in group)) for algorithm, group in groupby(taken, key=lambda pair: pair[0])]
    return [*found[:-1], (found[-1][0], NO_CROSSING)]


def _told(segments: Iterable[tuple[str, int]]) -> str:
    return ", ".join(algorithm if m == NO_CROSSING else f"{algorithm} {m}" for algorithm, m in segments)


def table(entry: tuned_gpu.Entry, before: tuple[GpuThreshold, ...]) -> list[str]:
    """What was measured, a line for each class of problems, and what calls did before where that differs."""
    lines = [
        f"algorithms and the tokens (M) up to which each is taken on {entry.gpu}",
        "",
        f"{'weights':<34}{'activations':<13}{'accuracy':<12}algorithms",
    ]
    for problem, rows in groupby(entry.rows, key=tuning_gpu.problem_of):
        bcq, limits = problem.op == "bcq_linear", next(rows)
        unit = "bits" if bcq else "codes for 8 weights"
        weights = f"{'bcq' if bcq else 'codebook'}, up to {limits.max_cost:g} {unit}"
        weights += ", uniform" if limits.scale_kind else ""
        kind = "fp16, bf16" if limits.max_x_bytes == 2 else "fp32"
        now, old = _told(_segments(entry.rows, problem)), _told(_segments(before, problem))
        lines.append(f"{weights:<34}{kind:<13}{ACCURACIES[problem.accuracy]:<12}{now}")
        if old != now:
            lines.append(f"{'':<50}{'before:':>8} {old}")
    return lines


def tune_cuda(args: argparse.Namespace) -> int:
    """Times the algorithms of the CUDA kernels on one GPU; or forgets what was measured on GPUs of its kind."""
    path, device = writable(tuned_gpu.FILE.path()), args.device or "cuda"
    if args.reset:
        gpu = tuned_gpu.Gpu.of(device_index(device))
        print_reset(path, tuned_gpu.reset(path, gpu, args.dry_run), args)
        tuned_gpu.forget()
        return 0
    if reason := cuda.BACKEND.unavailable():
        other = f"; Triton's kernels run here: `{TRITON_COMMAND}`" if triton.BACKEND.unavailable() is None else ""
        raise BackendError(f"there is nothing to measure, the CUDA backend cannot run: {reason}{other}")
    index, before = device_index(device), tuned_gpu.rows()
    shapes, tokens, seconds = QUICK if args.quick else FULL
    entry = tuning_gpu.measure(tuning_gpu.cases(shapes), tokens, seconds, index, with_bar)
    if not args.dry_run:
        tuned_gpu.save(path, entry)
        tuned_gpu.forget()
    if args.json:
        rows = [tuned_gpu.row_to_json(row) for row in before]
        print_json({"file": str(path), "written": not args.dry_run, "entry": entry.to_json(), "before": rows})
    else:
        sys.stdout.write("\n".join(table(entry, before)) + "\n")
    if not args.dry_run:
        say_written(path, "" if len(tuned_gpu.kinds()) == 1 else tuned_gpu.SEVERAL_KINDS)
    if triton.BACKEND.unavailable() is None:
        print(f"block sizes of Triton's kernels are tuned by `{TRITON_COMMAND}`", file=sys.stderr)
    return 0


def shape(text: str) -> tuple[int, int]:
    """The type of `--layer`: "4096x14336" -> (4096, 14336)."""
    n, _, k = text.partition("x")
    return int(n), int(k)


def tune_triton(args: argparse.Namespace) -> int:
    """Times block sizes of the Triton kernels, in fp16, for the layers asked for; or forgets them for this GPU."""
    if reason := triton.missing() if args.reset else triton.BACKEND.unavailable():
        raise BackendError(f"there is nothing to measure, the Triton backend cannot run: {reason}")
    with torch.cuda.device(device_index(args.device)) if args.device else nullcontext():
        return _reset_triton(args) if args.reset else _measure_triton(args)


def _reset_triton(args: argparse.Namespace) -> int:
    from ..kernels import tuned as of_triton

    path = writable(of_triton.FILE.path())
    gpu = of_triton.device_name(torch.cuda.current_device() if torch.cuda.is_available() else None)
    print_reset(path, of_triton.FILE.reset(path, lambda entry: entry.get("device") == gpu, args.dry_run), args)
    triton.forget()
    return 0


def _measure_triton(args: argparse.Namespace) -> int:
    from ..kernels import tuned as of_triton
    from ..kernels.tuning import tune_triton as measure

    shapes = args.layer or [shape(text) for text in TRITON_LAYERS[: 1 if args.quick else None]]
    every = not (args.bits or args.codebooks)
    base = OpCase(group_size=args.group_size, dtype="float16")
    formats = [replace(base, bits=bits) for bits in args.bits or (TRITON_BITS if every else ())]
    for books, vec_len in args.codebooks or (TRITON_CODEBOOKS if every else ()):
        books_of = replace(base, op="codebook_linear", num_codebooks=books, vec_len=vec_len, codebook_bits=8)
        formats.append(books_of)
    layers = [replace(case, N=n, K=k) for n, k in shapes for case in formats]

    def progress(plan: Sequence[Any]) -> Iterable[Any]:
        return tqdm(plan, unit="problem", file=sys.stderr)

    found = measure(layers, progress=progress, save=not args.dry_run)
    rows = [{"task": task._asdict(), "config": config._asdict()} for task, config in found.items()]
    if args.json:
        print_json({"file": str(of_triton.FILE.path()), "written": not args.dry_run, "configs": rows})
        return 0
    for task, config in found.items():
        text = " ".join(f"{name}={value}" for name, value in config._asdict().items())
        sys.stdout.write(f"{task.algorithm:<13}{task.M:>5}x{task.N}x{task.K} {task.planes}: {text}\n")
    return 0
