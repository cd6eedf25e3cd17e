"""`lutgemm tune`: measure where the algorithms cross on this machine, and have later calls choose by that."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import tuning
from ..backends import cpu, triton, tuned
from ..backends.heuristics import NO_CROSSING, Threshold
from ..errors import ArgumentError, BackendError
from ..formats.base import check_int
from ..testing.cases import OpCase
from ..testing.hardware import cpu_model, usable_cores
from ..testing.timing import torch_threads

NAME = "tune"
HELP = "measure on this machine which kernel is the fastest when; about 2 minutes, on an otherwise idle machine"

INTERRUPTED = "; nothing was written, run `lutgemm tune` again"
FULL = (tuning.SIZE, tuning.SECONDS)
QUICK = (tuning.QUICK_SIZE, tuning.QUICK_SECONDS)
"""N = K of the weights, and seconds of timing."""
BUSY = 0.7
"""Load average from which there is something else to wait for."""


TRITON_LAYERS = ("4096x4096", "6144x4096", "28672x4096", "4096x14336")
"""N x K of the layers of a model of 8 billion weights, queries, keys and values as one, and gate and up."""


def _shape(text: str) -> tuple[int, int]:
    """The type of `--layer`: "4096x14336" -> (4096, 14336)."""
    n, _, k = text.partition("x")
    return int(n), int(k)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lutgemm tune`."""
    parser.add_argument(
        "--backend", choices=("cpu", "triton"), default="cpu", help="triton: block sizes of its kernels on this GPU"
    )
    parser.add_argument(
        "--layer", type=_shape, action="append", metavar="NxK", help=f"triton: a layer, repeatable ({TRITON_LAYERS})"
    )
    parser.add_argument("--bits", type=int, action="append", metavar="B", help="triton: bits, repeatable (2, 3, 4)")
    parser.add_argument("--group-size", type=int, default=128, metavar="G", help="triton: group size (128)")
    parser.add_argument("--quick", action="store_true", help="smaller weights, about 20 seconds")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to measure with (default: as torch has them)")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")
    parser.add_argument("--reset", action="store_true", help="forget what was measured on this processor")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _file() -> Path:
    path = tuned.cache_file()
    if path is None:
        raise ArgumentError("you have no home folder to keep results in; set XDG_CACHE_HOME to an absolute path")
    return path


def _progress(weights: Sequence[OpCase]) -> Iterable[OpCase]:
    """The weights, with a bar on stderr."""
    with tqdm(total=len(weights), unit="weight", file=sys.stderr) as bar:
        for case in weights:
            books = f"{case.num_codebooks} codebooks of vectors of {case.vec_len}"
            bar.set_description(f"{case.bits} bits" if case.op == "bcq_linear" else books)
            yield case
            bar.update()


def tokens_before(rows: Iterable[Threshold], like: Threshold) -> tuple[int, int]:
    """What `rows` say for the op, algorithm, tables and cost of `like`: its two thresholds, 0 for no row."""
    kind = (like.op, like.algorithm, like.integer_tables, like.accuracy)
    same = [
        r for r in rows if (r.op, r.algorithm, r.integer_tables, r.accuracy) == kind and r.max_cost >= like.max_cost
    ]
    return max((r.max_tokens for r in same), default=0), max((r.max_tokens_bf16 for r in same), default=0)


def _shown(tokens: int) -> str:
    return "any" if tokens == NO_CROSSING else str(tokens)


def _table(entry: tuned.Entry, before: Sequence[Threshold]) -> list[str]:
    lines = [
        f"tokens (M) up to which an algorithm is taken on {entry.cpu}, {entry.isa}, threads: {entry.threads}",
        "",
        f"{'':<35}{'':<9}{'fp32, fp16':>16}{'bf16':>16}",
        f"{'algorithm':<11}{'cost up to':<24}{'tables':<9}{'before':>9}{'now':>7}{'before':>9}{'now':>7}",
    ]
    for row in entry.rows:
        cost = f"{row.max_cost:g} " + ("bits" if row.op == "bcq_linear" else "codes for 8 weights")
        old, old_narrow = map(_shown, tokens_before(before, row))
        now, narrow = _shown(row.max_tokens), _shown(row.max_tokens_bf16)
        tables = "integer" if row.integer_tables else "fp32"
        line = f"{row.algorithm:<11}{cost:<24}{tables:<9}{old:>9}{now:>7}{old_narrow:>9}{narrow:>7}"
        if row.accuracy:
            start = "never" if row.min_tokens == NO_CROSSING else f"from {row.min_tokens} tokens on"
            line += f"  {row.accuracy}: tiles, {start}"
        lines.append(line)
    return lines


def _reset(path: Path, args: argparse.Namespace) -> int:
    count = tuned.reset(path, cpu_model(), args.dry_run)
    if args.json:
        found: dict[str, Any] = {"file": str(path), "removed": count, "dry_run": args.dry_run}
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        verb = "would be removed from" if args.dry_run else "removed from"
        entries = f"{count} {'entry' if count == 1 else 'entries'}"
        sys.stdout.write(f"{entries} {verb} {path}\n" if count else f"nothing to remove from {path}\n")
    tuned.forget()
    return 0


def _run_triton(args: argparse.Namespace) -> int:
    """Times block sizes of the Triton kernels, fp16, for the layers asked for."""
    if reason := triton.BACKEND.unavailable():
        raise BackendError(f"there is nothing to measure, the Triton backend cannot run: {reason}")
    from ..kernels import tuned as of_triton
    from ..kernels.tuning import tune_triton

    shapes = args.layer or [_shape(text) for text in TRITON_LAYERS]
    base = OpCase(group_size=args.group_size, dtype="float16")
    layers = [replace(base, N=n, K=k, bits=bits) for n, k in shapes for bits in args.bits or (2, 3, 4)]

    def progress(plan: Sequence[Any]) -> Iterable[Any]:
        return tqdm(plan, unit="problem", file=sys.stderr)

    found = tune_triton(layers, progress=progress, save=not args.dry_run)
    rows = [{"task": task._asdict(), "config": config._asdict()} for task, config in found.items()]
    if args.json:
        document = {"file": str(of_triton.cache_file()), "written": not args.dry_run, "configs": rows}
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        for row in rows:
            text = " ".join(f"{name}={value}" for name, value in row["config"].items())
            task = row["task"]
            sys.stdout.write(
                f"{task['algorithm']:<13}{task['M']:>5}x{task['N']}x{task['K']} {task['planes']}: {text}\n"
            )
    return 0


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write unless told not to."""
    if args.backend == "triton" and not args.reset:
        return _run_triton(args)
    path = _file()
    if args.reset:
        return _reset(path, args)
    if args.threads is not None:
        check_int("threads", args.threads, 1, usable_cores())
    if reason := cpu.BACKEND.unavailable():
        raise BackendError(f"there is nothing to measure, the CPU backend cannot run: {reason}")
    threads = args.threads or torch.get_num_threads()
    before = tuned.rows(cpu.isa(), threads)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY:
        print(f"load average {os.getloadavg()[0]:.1f}: other processes run, results will vary more", file=sys.stderr)
    size, seconds = QUICK if args.quick else FULL
    with torch_threads(threads):
        fitting = tuning.fitting_size(size, seconds)
    if fitting < size:
        print(f"weights of {fitting} x {fitting}, as {size} x {size} would take too long here", file=sys.stderr)
    entry = tuning.measure(tuning.cases(fitting), seconds, threads, _progress)
    if not args.dry_run:
        tuned.save(path, entry)
        tuned.forget()
    if args.json:
        rows = [tuned.row_to_json(row) for row in before]
        found = {"file": str(path), "written": not args.dry_run, "entry": entry.to_json(), "before": rows}
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        sys.stdout.write("\n".join(_table(entry, before)) + "\n")
    if not args.dry_run:
        print(f"written to {path}; used from the next start on", file=sys.stderr)
        if tuned.switched_off():
            print(f"{tuned.VARIABLE}=0 is set: calls do not use it", file=sys.stderr)
    return 0
