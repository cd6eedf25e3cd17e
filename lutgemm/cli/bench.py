"""`lutgemm bench`: time the kernels beside torch, each checked before it is timed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..accuracy import ACCURACIES, DEFAULT, resolve_accuracy
from ..bench import block, machine, overhead, report
from ..bench.baselines import BASELINES, DEFAULT_BASELINES, SUITE_BASELINES, parse_baselines
from ..bench.block import BLOCKS
from ..bench.plot import save_plot
from ..bench.records import Record
from ..bench.runner import MODES, Options, run_cases
from ..bench.shapes import BCQ, CODEBOOK, MODELS, SUITES, parse_codebooks, parse_shapes
from ..checkpoint.atomic import write_file
from ..errors import ArgumentError
from ..formats.base import check_int
from ..testing.cases import DTYPES, OPS, SCALE_KINDS, OpCase
from ..testing.hardware import usable_cores

NAME = "bench"
HELP = "time the kernels against torch; results are checked first, and nothing wrong is timed"

SECONDS = 1.0
QUICK_SECONDS = 0.2
LOG_SECONDS = 10.0
"""Least time between lines of progress where stderr is no terminal."""
OVERHEAD = "overhead"
BLOCK = "block"
"""Suites without cases: what a call costs around its kernel; the linear layers of one transformer block."""
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", **{name: name for name in DTYPES}}


def _names(text: str) -> tuple[str, ...]:
    """Names separated by commas; none for an empty text."""
    names = tuple(part for part in text.split(",") if part)
    if text and not names:
        raise argparse.ArgumentTypeError(f"{text!r} has no names; separate them by commas")
    return names


def _some_names(text: str) -> tuple[str, ...]:
    if not text:
        raise argparse.ArgumentTypeError("got no names; separate them by commas")
    return _names(text)


def _numbers(argument: str, text: str, high: int) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ArgumentError(f"{argument}={text!r} is not supported; use integers separated by commas")
    return [check_int(argument, int(part), 1, high) for part in parts]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lutgemm bench`."""
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--suite", choices=[*SUITES, OVERHEAD, BLOCK], help="a list of cases, instead of the options below"
    )
    what.add_argument("--op", default=",".join(OPS), type=_some_names, help=f"some of {','.join(OPS)} (default: both)")
    what.add_argument(
        "--shapes", default="4096x4096", help=f"NxK, or a model: {', '.join(MODELS)} (default: %(default)s)"
    )
    what.add_argument("--m", default="1", help="tokens per call, such as 1,4,16 (default: %(default)s)")
    what.add_argument("--bits", default="2,3,4", help="bits of BCQ weights (default: %(default)s)")
    what.add_argument("--scale-kind", default="free", choices=SCALE_KINDS, help="of BCQ weights (default: %(default)s)")
    what.add_argument(
        "--codebooks", default="1x4x8", help="num_codebooks x vec_len x codebook_bits (default: %(default)s)"
    )
    what.add_argument("--group-size", default="128", help="weights that share a scale (default: %(default)s)")
    what.add_argument(
        "--dtype", default="fp32", type=_some_names, help="of x: some of fp32,fp16,bf16 (default: %(default)s)"
    )
    what.add_argument("--outliers", action="store_true", help="2 %% of the columns of x are 100 times the others")
    what.add_argument(
        "--accuracy",
        default="",
        type=_names,
        help=f"some of {','.join(ACCURACIES)} (default: {DEFAULT}; a suite has its own)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--algorithms", default="", type=_names, help="some of lut_gemm,biqgemm,codegemm,dequantize (default: all)"
    )
    how.add_argument(
        "--backends", default="", type=_names, help="default: all that are available, without the reference"
    )
    how.add_argument(
        "--isa", default="", type=_names, help="instruction sets of the cpu backend, or all (default: the best)"
    )
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu (--suite gpu, gpu-all: cuda)")
    how.add_argument("--threads", help="numbers of threads, such as 1,2 (default: 1; --suite cpu: 1 and 2)")
    how.add_argument("--cold", action="store_true", help="only with weights from memory")
    how.add_argument("--hot", action="store_true", help="only with weights that may stay in the caches")
    how.add_argument(
        "--baselines",
        type=_names,
        help=f"all, or some of {','.join(BASELINES)} "
        f"(default: {','.join(DEFAULT_BASELINES)}; --suite cpu, gpu: all that run there)",
    )
    how.add_argument("--seconds", type=float, help=f"per case, mode and number of threads (default: {SECONDS:g})")
    how.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS} --seconds and --cold, where not given")
    out = parser.add_argument_group("result")
    out.add_argument("--json", metavar="FILE", help="also save every figure, with the header; - writes it to stdout")
    out.add_argument("--plot", metavar="PNG", help="also draw a roofline and a bar chart (needs matplotlib)")
    out.add_argument("--repro", action="store_true", help="print the command that measures each line again")


def dtype_name(text: str) -> str:
    """The full name of a dtype of x. Raises `ArgumentError` for one that x cannot have."""
    if text not in DTYPE_NAMES:
        raise ArgumentError(f"dtype={text!r} is unknown; use some of fp32, fp16, bf16")
    return DTYPE_NAMES[text]


def torch_dtype(text: str) -> torch.dtype:
    """The dtype that `dtype_name` names."""
    return OpCase(dtype=dtype_name(text)).torch_dtype


def cases_of(args: argparse.Namespace) -> list[OpCase]:
    """The cases that the options ask for. Raises `ArgumentError` for values that no format allows."""
    for accuracy in args.accuracy:
        resolve_accuracy(accuracy)
    cases = SUITES[args.suite]() if args.suite else _cases_of_options(args)
    if args.accuracy:
        cases = list(dict.fromkeys(replace(case, accuracy=accuracy) for case in cases for accuracy in args.accuracy))
    for case in cases:
        assert case.layout
    return cases


def _cases_of_options(args: argparse.Namespace) -> list[OpCase]:
    group_size = check_int("group-size", int(args.group_size) if args.group_size.isdecimal() else -1, 1, 1 << 24)
    cases: list[OpCase] = []
    for op in args.op:
        if op not in OPS:
            raise ArgumentError(f"op={op!r} is unknown; use some of {list(OPS)}")
        if op == "bcq_linear":
            kinds = [replace(BCQ, bits=b, scale_kind=args.scale_kind) for b in _numbers("bits", args.bits, 8)]
        else:
            kinds = [
                replace(CODEBOOK, num_codebooks=c, vec_len=v, codebook_bits=b)
                for c, v, b in parse_codebooks(args.codebooks)
            ]
        for dtype in args.dtype:
            cases += [
                replace(kind, N=n, K=k, M=m, group_size=group_size, dtype=dtype_name(dtype), outliers=args.outliers)
                for n, k in parse_shapes(args.shapes)
                for kind in kinds
                for m in _numbers("m", args.m, 1 << 16)
            ]
    return cases


def options_of(args: argparse.Namespace) -> Options:
    """How to run them."""
    modes = [mode for mode in MODES if getattr(args, mode)] or list(MODES)
    threads = args.threads or ("1,2" if args.suite == "cpu" and usable_cores() > 1 else "1")
    baselines = SUITE_BASELINES.get(args.suite, DEFAULT_BASELINES)
    return Options(
        algorithms=args.algorithms,
        backends=args.backends,
        isas=args.isa,
        threads=tuple(_numbers("threads", threads, 1024)),
        modes=("cold",) if args.quick and not (args.hot or args.cold) else tuple(modes),
        baselines=baselines if args.baselines is None else tuple(parse_baselines(args.baselines)),
        seconds=seconds_of(args),
        device=device_of(args),
    )


def device_of(args: argparse.Namespace) -> str:
    """The device asked for; suites of GPUs are for one."""
    return str(args.device or ("cuda" if str(args.suite).startswith("gpu") else "cpu"))


def seconds_of(args: argparse.Namespace) -> float:
    """Seconds per case. Raises `ArgumentError` for a number that makes no sense."""
    seconds = args.seconds if args.seconds is not None else QUICK_SECONDS if args.quick else SECONDS
    if not 0 < seconds <= 3600:
        raise ArgumentError(f"seconds={seconds} is not supported; use a number above 0, up to 3600")
    return float(seconds)


def run_all(
    cases: list[OpCase], options: Options, save: Callable[[list[Record]], None] = lambda records: None
) -> list[Record]:
    """Every record, with a progress bar on stderr; a line now and then where that is no terminal.

    save: is given all records so far after every group, so that a run that is cut short has lost none.
    """
    records: list[Record] = []
    groups = run_cases(cases, options)
    interval = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    with tqdm(total=len(cases), unit="case", file=sys.stderr, mininterval=interval, maxinterval=interval) as bar:
        for group, found in groups:
            records += found
            save(records)
            bar.set_postfix_str(f"M={group[0].M} {group[0].N}x{group[0].K} done", refresh=False)
            bar.update(len(group))
    return records


def _target_path(argument: str, text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise ArgumentError(f"{argument}={text!r}: the folder {str(path.parent)!r} does not exist; create it first")
    return path


def run_special(args: argparse.Namespace, json_path: Path | None) -> int:
    """Measure and print a suite without cases. Returns 1 when a result of ours was wrong."""
    if args.plot:
        raise ArgumentError(f"plot={args.plot!r}: there is no drawing of --suite {args.suite}; leave --plot out")
    header, seconds = machine.header(), seconds_of(args)
    found: list[dict[str, Any]]
    if args.suite == OVERHEAD:
        calls = overhead.measure(seconds)
        found, shown, correct = [record.to_dict() for record in calls], overhead.table(calls), True
    else:
        threads = _numbers("threads", args.threads or "1", 1024)
        blocks = [
            record
            for model in BLOCKS
            for dtype in args.dtype
            for count in threads
            for record in block.measure(model, seconds, device_of(args), torch_dtype(dtype), count)
        ]
        found, shown = [record.to_dict() for record in blocks], block.table(blocks)
        correct = all(record.correct for record in blocks)
    saved = json.dumps({"header": header, args.suite: found}, indent=1)
    print(saved if args.json == "-" else f"{report.header_text(header, [])}\n\n{shown}")
    if json_path:
        write_file(json_path, f"{saved}\n".encode())
    return 0 if correct else 1


def run(args: argparse.Namespace) -> int:
    """Measure, print, save. Returns 1 when a result of ours was wrong."""
    json_path = _target_path("json", args.json) if args.json and args.json != "-" else None
    plot_path = _target_path("plot", args.plot) if args.plot else None
    if args.suite in (OVERHEAD, BLOCK):
        return run_special(args, json_path)
    cases, options = cases_of(args), options_of(args)
    header = machine.header()
    save = partial(report.write_json, json_path, header) if json_path else None
    records = run_all(cases, options, *filter(None, [save]))
    if args.json == "-":
        print(report.dumps(header, records))
    else:
        print(report.header_text(header, records), report.table(records, header), sep="\n\n")
    if args.repro and args.json != "-":
        print("", *(record.repro for record in records), sep="\n")
    if plot_path:
        save_plot(plot_path, header, records)
    return 0 if all(record.correct for record in records) else 1
