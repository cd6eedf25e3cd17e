"""`lutgemm tune`: measure where the algorithms cross on this machine, and have later calls choose by that."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence

import torch

from .. import tuning
from ..backends import cpu, tuned
from ..backends.heuristics import NO_CROSSING, Threshold
from ..errors import ArgumentError, BackendError
from ..formats.base import check_int
from ..testing.hardware import cpu_model, usable_cores
from ..testing.timing import torch_threads
from ._tune_common import print_json, print_reset, say_written, with_bar, writable
from ._tune_gpu import TRITON_LAYERS, shape, tune_cuda, tune_triton

NAME = "tune"
HELP = "measure on this machine which kernel is the fastest when; about 2 minutes, on an otherwise idle machine"

INTERRUPTED = "; nothing was written, run the same command again"
FULL = (tuning.SIZE, tuning.SECONDS)
QUICK = (tuning.QUICK_SIZE, tuning.QUICK_SECONDS)
"""N = K of the weights, and seconds of timing."""
BUSY = 0.7
"""Load average from which there is something else to wait for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lutgemm tune`."""
    parser.add_argument(
        "--device", help="cpu (default), cuda or cuda:N: which kernel is the fastest when, on this processor or GPU"
    )
    parser.add_argument(
        "--backend",
        choices=("cpu", "cuda", "triton"),
        help="triton: block sizes of its kernels; else --device is enough",
    )
    parser.add_argument(
        "--layer", type=shape, action="append", metavar="NxK", help=f"triton: a layer, repeatable ({TRITON_LAYERS})"
    )
    parser.add_argument(
        "--bits", type=int, action="append", metavar="B", help="triton: BCQ's bits, repeatable (2, 3, 4)"
    )
    parser.add_argument(
        "--codebooks",
        type=shape,
        action="append",
        metavar="CxV",
        help="triton: so many codebooks of 8 bits and vectors of V weights, repeatable (1x4, 2x8)",
    )
    parser.add_argument("--group-size", type=int, default=128, metavar="G", help="triton: group size (128)")
    parser.add_argument("--quick", action="store_true", help="smaller or fewer weights, about 20 seconds on a CPU")
    parser.add_argument("--threads", type=int, metavar="N", help="cpu: threads to measure with (as torch has them)")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")
    parser.add_argument("--reset", action="store_true", help="forget what was measured on this processor or GPU")
    parser.add_argument("--json", action="store_true", help="print JSON")


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


def _backend(args: argparse.Namespace) -> str:
    """What `--device` and `--backend` mean together. Raises `ArgumentError` for a contradiction."""
    on_cpu = args.device in (None, "cpu")
    if args.backend is None:
        return "cpu" if on_cpu else "cuda"
    if args.device is not None and on_cpu != (args.backend == "cpu"):
        raise ArgumentError(f"backend={args.backend!r} does not run on device={args.device!r}; leave one of them out")
    return str(args.backend)


def _tune_cpu(args: argparse.Namespace) -> int:
    path = writable(tuned.cache_file())
    if args.reset:
        print_reset(path, tuned.reset(path, cpu_model(), args.dry_run), args)
        tuned.forget()
        return 0
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
    entry = tuning.measure(tuning.cases(fitting), seconds, threads, with_bar)
    if not args.dry_run:
        tuned.save(path, entry)
        tuned.forget()
    if args.json:
        rows = [tuned.row_to_json(row) for row in before]
        print_json({"file": str(path), "written": not args.dry_run, "entry": entry.to_json(), "before": rows})
    else:
        sys.stdout.write("\n".join(_table(entry, before)) + "\n")
    if not args.dry_run:
        say_written(path)
    return 0


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write unless told not to."""
    backend = _backend(args)
    if backend == "cpu":
        return _tune_cpu(args)
    if args.threads is not None:
        raise ArgumentError(f"threads={args.threads}: a GPU has none to set; leave --threads out")
    return tune_cuda(args) if backend == "cuda" else tune_triton(args)
