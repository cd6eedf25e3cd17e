"""`lutgemm tune`: measure where the algorithms cross on this machine, and have later calls choose by that."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import tuning
from ..backends import cpu, tuned
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lutgemm tune`."""
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
    kind = (like.op, like.algorithm, like.integer_tables)
    same = [r for r in rows if (r.op, r.algorithm, r.integer_tables) == kind and r.max_cost >= like.max_cost]
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
        lines.append(f"{row.algorithm:<11}{cost:<24}{tables:<9}{old:>9}{now:>7}{old_narrow:>9}{narrow:>7}")
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


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write unless told not to."""
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
