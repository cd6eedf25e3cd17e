"""`lutgemm verify`: a quantized checkpoint against its original."""

from __future__ import annotations

import argparse
import json
import sys

from ..checkpoint.reader import local_folder
from ..checkpoint.verification import verification_text, verify_checkpoint

NAME = "verify"
HELP = "check a quantized checkpoint against its original"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dst", metavar="DST", help="folder that `lutgemm quantize` wrote")
    parser.add_argument("src", metavar="SRC", help="the original checkpoint, a folder or hub id")
    parser.add_argument("--revision", metavar="REV", help="revision of a hub id given as SRC")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    source = local_folder(args.src, args.revision)
    result = verify_checkpoint(local_folder(args.dst), source, progress=not args.quiet)
    print(json.dumps(result) if args.json else verification_text(result))
    if not result["ok"]:
        print(
            f"lutgemm: error: {args.dst}: {len(result['problems'])} problems, first: {result['problems'][0]}; "
            "quantize the model again, or check that SRC is the original",
            file=sys.stderr,
        )
    return 0 if result["ok"] else 1
