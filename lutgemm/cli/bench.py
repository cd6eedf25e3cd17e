"""`lutgemm bench`: time the kernels beside torch, each checked before it is timed."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ..bench import machine, report
from ..bench.baselines import BASELINES, DEFAULT_BASELINES, parse_baselines
from ..bench.runner import MODES, Options, Record, run_cases
from ..bench.shapes import BCQ, CODEBOOK, MODELS, SUITES, parse_codebooks, parse_shapes
from ..errors import ArgumentError
from ..formats.base import check_int
from ..testing.cases import DTYPES, OPS, SCALE_KINDS, OpCase

NAME = "bench"
HELP = "time the kernels against torch; results are checked first, and nothing wrong is timed"

QUICK_SECONDS = 0.2
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", **{name: name for name in DTYPES}}


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _numbers(argument: str, text: str, high: int) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ArgumentError(f"{argument}={text!r} is not supported; use integers separated by commas")
    return [check_int(argument, int(part), 1, high) for part in parts]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lutgemm bench`."""
    what = parser.add_argument_group("what to measure")
    what.add_argument("--suite", choices=sorted(SUITES), help="a named list of cases, instead of the options below")
    what.add_argument("--op", default=",".join(OPS), help=f"some of {','.join(OPS)} (default: both)")
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
    what.add_argument("--dtype", default="fp32", help="of x: some of fp32,fp16,bf16 (default: %(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument("--algorithms", default="", help="some of lut_gemm,biqgemm,codegemm,dequantize (default: all)")
    how.add_argument("--backends", default="", help="default: all that are available, without the reference")
    how.add_argument("--isa", default="", help="instruction sets of the cpu backend, or all (default: the best)")
    how.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    how.add_argument("--threads", default="1", help="numbers of threads, such as 1,2 (default: %(default)s)")
    how.add_argument("--cold", action="store_true", help="only with weights from memory")
    how.add_argument("--hot", action="store_true", help="only with weights that may stay in the caches")
    how.add_argument("--baselines", default=",".join(DEFAULT_BASELINES), help=f"some of {','.join(BASELINES)}")
    how.add_argument("--seconds", type=float, default=1.0, help="per case, mode and number of threads (default: 1)")
    how.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS} seconds and cold weights only")
    out = parser.add_argument_group("result")
    out.add_argument("--json", metavar="FILE", help="also save every figure, with the header; - writes it to stdout")
    out.add_argument("--plot", metavar="PNG", help="also draw the times (needs matplotlib)")
    out.add_argument("--repro", action="store_true", help="print the command that measures each line again")


def cases_of(args: argparse.Namespace) -> list[OpCase]:
    """The cases that the options ask for. Raises `ArgumentError` for values that no format allows."""
    if args.suite:
        return SUITES[args.suite]()
    group_size = check_int("group-size", int(args.group_size) if args.group_size.isdecimal() else -1, 1, 1 << 24)
    cases: list[OpCase] = []
    for op in _names(args.op):
        if op not in OPS:
            raise ArgumentError(f"op={op!r} is unknown; use some of {list(OPS)}")
        if op == "bcq_linear":
            kinds = [replace(BCQ, bits=b, scale_kind=args.scale_kind) for b in _numbers("bits", args.bits, 8)]
        else:
            kinds = [
                replace(CODEBOOK, num_codebooks=c, vec_len=v, codebook_bits=b)
                for c, v, b in parse_codebooks(args.codebooks)
            ]
        for dtype in _names(args.dtype):
            if dtype not in DTYPE_NAMES:
                raise ArgumentError(f"dtype={dtype!r} is unknown; use some of fp32, fp16, bf16")
            cases += [
                replace(kind, N=n, K=k, M=m, group_size=group_size, dtype=DTYPE_NAMES[dtype])
                for n, k in parse_shapes(args.shapes)
                for kind in kinds
                for m in _numbers("m", args.m, 1 << 16)
            ]
    for case in cases:
        assert case.layout
    return cases


def options_of(args: argparse.Namespace) -> Options:
    """How to run them."""
    if not 0 < args.seconds <= 3600:
        raise ArgumentError(f"seconds={args.seconds} is not supported; use a number above 0, up to 3600")
    modes = [mode for mode in MODES if getattr(args, mode)] or list(MODES)
    return Options(
        algorithms=_names(args.algorithms),
        backends=_names(args.backends),
        isas=_names(args.isa),
        threads=tuple(_numbers("threads", args.threads, 1024)),
        modes=("cold",) if args.quick and not (args.hot or args.cold) else tuple(modes),
        baselines=tuple(parse_baselines(_names(args.baselines))),
        seconds=QUICK_SECONDS if args.quick else args.seconds,
        device=args.device,
    )


def run_all(cases: list[OpCase], options: Options) -> list[Record]:
    """Every record, with a progress bar on stderr."""
    records: list[Record] = []
    with tqdm(total=len(cases), unit="case", file=sys.stderr, disable=None) as bar:
        for found in run_cases(cases, options):
            records += found
            bar.update()
    return records


def _target_path(argument: str, text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise ArgumentError(f"{argument}={text!r}: the folder {str(path.parent)!r} does not exist; create it first")
    return path


def run(args: argparse.Namespace) -> int:
    """Measure, print, save. Returns 1 when a result was wrong."""
    json_path = _target_path("json", args.json) if args.json and args.json != "-" else None
    plot_path = _target_path("plot", args.plot) if args.plot else None
    cases, options = cases_of(args), options_of(args)
    header = machine.header()
    records = run_all(cases, options)
    if args.json == "-":
        print(report.dumps(header, records))
    else:
        print(report.header_text(header, records), report.table(records), sep="\n\n")
    if args.repro and args.json != "-":
        print("", *(record.repro for record in records), sep="\n")
    if json_path:
        report.write_json(json_path, header, records)
    if plot_path:
        report.save_plot(plot_path, header, records)
    return 0 if all(record.correct for record in records) else 1
