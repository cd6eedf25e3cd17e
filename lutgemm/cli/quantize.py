"""`lutgemm quantize`: a Hugging Face checkpoint to a quantized one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..checkpoint.convert import quantize_checkpoint
from ..checkpoint.estimate import dry_run, dry_run_text
from ..checkpoint.json_file import read_json
from ..checkpoint.plan import Options, parse_config
from ..checkpoint.reader import local_folder
from ..checkpoint.records import LayerResult
from ..checkpoint.report import layout_text, not_copied_lines, summary_lines
from ..config import BCQ_METHODS, BCQ_SCALE_KINDS, CONFIGS
from ..errors import ArgumentError
from ..formats.base import SCALE_DTYPES
from ._model import positive_int, use_threads

NAME = "quantize"
HELP = "quantize a Hugging Face checkpoint"
INTERRUPTED = "; what is finished is kept, run the same command with --resume to go on"

BCQ_OPTIONS = ("bits", "scale_kind", "method", "offsets", "nested_bits")
CODEBOOK_OPTIONS = ("num_codebooks", "vec_len", "codebook_bits")
COMMON_OPTIONS = ("group_size", "scale_dtype", "iters")


def _group_size(text: str) -> int | str:
    return text if text == "row" else int(text)


def _int_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(usage_error=parser.error)
    parser.add_argument("src", metavar="SRC", help="checkpoint folder, or a hub id to download")
    parser.add_argument("dst", metavar="DST", nargs="?", help="new folder for the result (not needed with --dry-run)")
    parser.add_argument("--format", choices=sorted(CONFIGS), help="weight format (default: bcq)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON file of settings; options below override it")
    parser.add_argument(
        "--group-size", type=_group_size, metavar="N", help='weights that share a scale, or "row" (default: 128)'
    )
    parser.add_argument("--scale-dtype", choices=sorted(SCALE_DTYPES), help="dtype of scales (default: float16)")
    parser.add_argument("--iters", type=int, metavar="N", help="rounds of alternating or of k-means")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the k-means start (default: 0; bcq has no randomness)"
    )
    bcq = parser.add_argument_group("bcq")
    bcq.add_argument("--bits", type=int, metavar="N", help="binary codes per weight, 1..8 (default: 4)")
    bcq.add_argument("--scale-kind", choices=BCQ_SCALE_KINDS, help="kind of scales (default: auto, per layer)")
    bcq.add_argument("--method", choices=BCQ_METHODS, help="quantizer (default: best)")
    bcq.add_argument("--no-offsets", dest="offsets", action="store_const", const=False, help="no additive offsets")
    bcq.add_argument("--nested-bits", type=_int_list, metavar="A,B", help="lower precisions kept usable")
    codebook = parser.add_argument_group("codebook")
    codebook.add_argument("--num-codebooks", type=int, metavar="N", help="summed centroids a vector, 1..4 (default: 1)")
    codebook.add_argument("--vec-len", type=int, metavar="N", help="weights per code: 2, 4, 8, 16 (default: 4)")
    codebook.add_argument("--codebook-bits", type=int, metavar="N", help="log2 of the centroids, 1..12 (default: 8)")
    which = parser.add_argument_group("which layers")
    which.add_argument("--include", action="append", metavar="REGEX", help="only modules that match (repeatable)")
    which.add_argument("--exclude", action="append", metavar="REGEX", help="not modules that match (repeatable)")
    which.add_argument(
        "--module",
        action="append",
        metavar="REGEX=KEY:VALUE,...",
        help="other settings where REGEX matches (repeatable)",
    )
    which.add_argument("--lm-head", action="store_true", help="quantize the output layer too, unless it is tied")
    run_group = parser.add_argument_group("running")
    run_group.add_argument("--device", default="cpu", help="where the quantizer computes (default: cpu)")
    run_group.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's own choice)"
    )
    run_group.add_argument(
        "--dry-run", action="store_true", help="print sizes, memory and time estimates; write nothing"
    )
    run_group.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same settings")
    run_group.add_argument("--revision", metavar="REV", help="revision of a hub id")
    run_group.add_argument("--json", action="store_true", help="print the report as one JSON object")
    run_group.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    run_group.add_argument("-v", "--verbose", action="store_true", help="one line on stderr per layer")


def _value(text: str) -> Any:
    """A value of --module: JSON where it is JSON (numbers, true), text otherwise."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_module(text: str) -> tuple[str, dict[str, Any]]:
    """`REGEX=key:value,key:value` -> (regex, fields). Raises `ArgumentError`."""
    pattern, separator, fields = text.rpartition("=")
    pairs = [part.partition(":") for part in fields.split(",")]
    if not separator or not pattern or not all(key and colon and value for key, colon, value in pairs):
        raise ArgumentError(f"--module {text!r}: expected REGEX=KEY:VALUE,... for example 'down_proj=bits:4'")
    return pattern, {key.replace("-", "_"): _value(value) for key, _, value in pairs}


def _settings(path: Path | None) -> dict[str, Any]:
    """The settings file. Raises when it is not a JSON object of the known keys."""
    if path is None:
        return {}
    settings = read_json(path, remedy="see docs/cli.md for what --config takes")
    known = {"config": dict, "modules": dict, "include": list, "exclude": list, "lm_head": bool}
    for key, value in settings.items():
        if key not in known or not isinstance(value, known[key]):
            expected = {name: kind.__name__ for name, kind in known.items()}
            raise ArgumentError(f"--config {path}: {key!r} is unknown or of the wrong type; accepted are {expected}")
    return settings


def options_of(args: argparse.Namespace) -> Options:
    """Settings file and command line together, the command line winning. Raises `ArgumentError`."""
    settings = _settings(args.config)
    fields: dict[str, Any] = dict(settings.get("config", {}))
    if args.format and args.format != fields.get("format", args.format):
        fields = {}
    fields["format"] = args.format or fields.get("format", "bcq")
    own, other = (BCQ_OPTIONS, CODEBOOK_OPTIONS) if fields["format"] == "bcq" else (CODEBOOK_OPTIONS, BCQ_OPTIONS)
    for name in other:
        if getattr(args, name) is not None:
            option = "--no-offsets" if name == "offsets" else "--" + name.replace("_", "-")
            raise ArgumentError(f"{option} does not go with --format {fields['format']}; leave one of them out")
    given: Mapping[str, Any] = {name: getattr(args, name) for name in (*COMMON_OPTIONS, *own)}
    fields |= {name: value for name, value in given.items() if value is not None}
    if args.seed is not None and fields["format"] == "codebook":
        fields["seed"] = args.seed
    return Options(
        config=parse_config(fields, "settings"),
        modules=(*settings.get("modules", {}).items(), *(parse_module(text) for text in args.module or [])),
        include=(*settings.get("include", []), *(args.include or [])),
        exclude=(*settings.get("exclude", []), *(args.exclude or [])),
        lm_head=args.lm_head or settings.get("lm_head", False),
        device=args.device,
    )


def run(args: argparse.Namespace) -> int:
    options = options_of(args)
    if args.dst is None and not args.dry_run:
        args.usage_error("DST is missing; give a new folder for the result, or --dry-run")
    use_threads(args.threads)
    source = local_folder(args.src, args.revision)
    if args.dry_run:
        estimate = dry_run(source, options)
        print(json.dumps(estimate) if args.json else dry_run_text(estimate))
        return 0
    report = quantize_checkpoint(
        source,
        args.dst,
        options.config,
        modules=options.modules,
        include=options.include,
        exclude=options.exclude,
        lm_head=options.lm_head,
        device=options.device,
        resume=args.resume,
        progress=not args.quiet,
        on_layer=_print_layer if args.verbose else None,
        base_model=None if Path(args.src).is_dir() else args.src,
    )
    for line in not_copied_lines(report):
        print(f"lutgemm: {line}", file=sys.stderr)
    print(json.dumps(report) if args.json else "\n".join([*summary_lines(report), f"written to {args.dst}"]))
    return 0


def _print_layer(result: LayerResult) -> None:
    text = (
        f"{result.module}: {result.shape[0]}x{result.shape[1]}, {layout_text(result.layout)}, "
        f"{result.bits_per_weight:.2f} bits per weight, relative error {result.relative_error:.4f}, "
        f"{result.seconds:.2f} s"
    )
    tqdm.write(text, file=sys.stderr)
