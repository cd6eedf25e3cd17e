"""`lutgemm demo`: a real language model, quantized and measured on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..demo.run import Settings, run_demo
from ._model import positive_int, use_threads

NAME = "demo"
HELP = "quantize a real language model and show what it gains and loses"
INTERRUPTED = "; run the same command again, it goes on after the last finished step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="downloads, models and results; what is there is reused (default: demo-output)",
    )
    parser.add_argument("--tokens", type=positive_int, default=8192, metavar="N", help="of text scored (default: 8192)")
    parser.add_argument(
        "--seconds", type=positive_int, default=10, metavar="S", help="decode timing of each row (default: 10)"
    )
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="print what results.json holds in place of the table")


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    record = run_demo(Settings(args.out, args.tokens, args.seconds), quiet=args.json)
    if args.json:
        print(json.dumps(record))
    return 0
