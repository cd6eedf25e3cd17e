"""`lutgemm inspect`: what a checkpoint holds, from its headers."""

from __future__ import annotations

import argparse
import json

from ..checkpoint.inspection import inspect_checkpoint, inspection_text
from ..checkpoint.reader import local_folder

NAME = "inspect"
HELP = "show formats, bits per weight and coverage of a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="checkpoint folder, quantized or not, or a hub id")
    parser.add_argument("--values", action="store_true", help="also read every record and check its values")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    result = inspect_checkpoint(local_folder(args.path), values=args.values)
    print(json.dumps(result) if args.json else inspection_text(result))
    return 0
