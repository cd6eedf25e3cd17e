"""What `lutgemm tune` does on CPUs and GPUs alike: the file, progress, and what it says at the end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..backends.tuned_file import VARIABLE, switched_off
from ..errors import ArgumentError
from ..testing.cases import OpCase


def writable(path: Path | None) -> Path:
    """The file to keep results in. Raises `ArgumentError` where there is no place for one."""
    if path is None:
        raise ArgumentError("you have no home folder to keep results in; set XDG_CACHE_HOME to an absolute path")
    return path


def with_bar(weights: Sequence[OpCase]) -> Iterable[OpCase]:
    """The weights, with a bar on stderr."""
    with tqdm(total=len(weights), unit="weight", file=sys.stderr) as bar:
        for case in weights:
            books = f"{case.num_codebooks} codebooks of vectors of {case.vec_len}"
            bar.set_description(f"{case.bits} bits" if case.op == "bcq_linear" else books)
            yield case
            bar.update()


def print_json(found: Any) -> None:
    """The result for machines."""
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def print_reset(path: Path, count: int, args: argparse.Namespace) -> None:
    """How many entries went, or would."""
    if args.json:
        print_json({"file": str(path), "removed": count, "dry_run": args.dry_run})
        return
    verb = "would be removed from" if args.dry_run else "removed from"
    entries = f"{count} {'entry' if count == 1 else 'entries'}"
    sys.stdout.write(f"{entries} {verb} {path}\n" if count else f"nothing to remove from {path}\n")


def say_written(path: Path, unused: str = "") -> None:
    """Where results are kept. unused: why calls do not obey them, if so."""
    print(f"written to {path}; used from the next start on", file=sys.stderr)
    unused = f"{VARIABLE}=0 is set" if switched_off() else unused
    if unused:
        print(f"{unused}: calls do not use it", file=sys.stderr)
