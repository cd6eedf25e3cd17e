"""The figures to reach on a GPU, and what runs reached of them: `python -m lutgemm.bench.goals RUN.json ...`.

Times are of one token, weights from memory, x in fp16, groups of 128, the default accuracy, on an H100. Every goal is
looked up in what `lutgemm bench --json` wrote; one whose records are missing is pending, neither reached nor missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutgemm.accuracy import DEFAULT

Found = Mapping[str, Any]
"""A record of a run, as JSON has it."""

KINDS = ("4-bit", "3-bit", "2-bit", "1-bit", "codebook 1x4x8", "codebook 2x8x8")
H100_US: dict[tuple[int, int], tuple[float, ...]] = {
    (8192, 8192): (15, 12, 9, 6.5, 11, 11),
    (28672, 4096): (25, 19, 14, 9, 17, 17),
    (4096, 4096): (6, 5, 4.5, 4, 5.5, 5.5),
}
"""N x K -> the most microseconds of each of `KINDS`."""
WIDE = 8192 * 8192
"""N * K from which a layer counts as large."""
H200_FASTER = 1.25
"""How much faster than an H100 an H200 is to be on large layers."""
BLOCK_US = 60.0
"""Of a whole block of Llama 3.1 8B at 2 bits."""
BANDWIDTH_PERCENT = 80.0
"""Of the copy bandwidth, on large layers of 2 bits or more."""
FEW_TOKENS = (2, 4, 8)
FEW_TOKENS_RATIO = 1.25
"""The most that so many tokens may cost, over one."""
OVER_CUBLAS = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0, 32: 1.0, 1024: 0.85, 4096: 0.85}
"""Tokens -> the least ratio of cuBLAS's time (fp16) to that of what "auto" takes."""
NAMED = {"lut_gemm": "bcq_linear", "biqgemm": "bcq_linear", "codegemm": "codebook_linear"}
"""The algorithms of the papers: each is to be faster than a textbook LUT-GEMM of as many bits, for one token."""
PEERS = {
    "tinygemm": {"torch_int4": 4},
    "torchao": {"torchao_int4": 4},
    "bitsandbytes": {"bnb_nf4_cuda": 4},
    "gemlite": {f"gemlite_{bits}bit": bits for bits in (1, 2, 4)},
    "humming": {f"humming_{bits}bit": bits for bits in (1, 2, 3, 4)},
}
"""Package -> its baselines and their bits. Compared with those of as many bits as ours, or more."""
PEER_TOKENS, PEER_BITS = 16, 3
"""Up to so many tokens and bits, "auto" is not to be behind any of them."""
TRITON_TOKENS, TRITON_RATIO, TRITON_OVER_CUBLAS = 8, 1.3, 0.9


@dataclass(frozen=True)
class Goal:
    """One figure asked for. found: what the runs have, None where they have nothing of it."""

    what: str
    asked: float
    unit: str
    """"us", "x" or "%" """
    found: float | None
    at_most: bool = True
    how: str = ""
    """the algorithm, or the case that decides"""
    record: Found | None = None
    """of a time: the record that has it"""

    @property
    def reached(self) -> bool | None:
        if self.found is None:
            return None
        return self.found <= self.asked if self.at_most else self.found >= self.asked

    @property
    def verdict(self) -> str:
        return {True: "reached", False: "missed", None: "pending"}[self.reached]

    @property
    def asked_text(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.asked:g} {self.unit}"

    @property
    def found_text(self) -> str:
        return "-" if self.found is None else f"{self.found:.{1 if self.unit != 'x' else 2}f} {self.unit}"


def kind_of(record: Found) -> str:
    """One of `KINDS`, or another name for weights of which nothing is asked."""
    if record["op"] == "bcq_linear":
        return f"{record['bits']}-bit" + ("" if record["scale_kind"] == "free" else f" {record['scale_kind']}")
    return f"codebook {record['num_codebooks']}x{record['vec_len']}x{record['codebook_bits']}"


def bits_of(kind: str) -> int:
    """Bits of a weight of one of `KINDS`: its codebooks have 2."""
    return 2 if kind.startswith("codebook") else int(kind[0])


def _case(record: Found) -> str:
    return f"{record['N']}x{record['K']} {kind_of(record)} M={record['M']} {record['algorithm']}"


def counted(runs: Iterable[Mapping[str, Any]], backend: str) -> list[Found]:
    """The records of a backend that goals are about: timed on a GPU, cold, and of the kinds above."""
    return [
        r
        for run in runs
        for r in run.get("records", ())
        if r["backend"] == backend
        and r["device"] == "cuda"
        and r["median_us"] is not None
        and (r["mode"], r["accuracy"], r["group_size"], r["dtype"]) == ("cold", DEFAULT, 128, "float16")
        and kind_of(r) in KINDS
    ]


def fastest(records: Iterable[Found]) -> dict[tuple[int, int, str, int], Found]:
    """(N, K, kind, M) -> its fastest record."""
    best: dict[tuple[int, int, str, int], Found] = {}
    for record in records:
        key = (record["N"], record["K"], kind_of(record), record["M"])
        best[key] = min(record, best.get(key, record), key=lambda r: r["median_us"])
    return best


def _extreme(
    values: Iterable[tuple[float | None, Found]], choose: Callable[..., tuple[float, Found]]
) -> tuple[float | None, str]:
    """The least or greatest value, and the case that has it."""
    known = [(value, record) for value, record in values if value is not None]
    if not known:
        return None, ""
    value, record = choose(known, key=lambda pair: pair[0])
    return value, _case(record)


def _at_least(what: str, asked: float, values: Iterable[tuple[float | None, Found]], unit: str = "x") -> Goal:
    """The least of the values decides."""
    found, how = _extreme(values, min)
    return Goal(what, asked, unit, found, at_most=False, how=how)


def _times(best: Mapping[tuple[int, int, str, int], Found], gpu: str) -> list[Goal]:
    goals = []
    for (n, k), figures in H100_US.items():
        faster = H200_FASTER if "H200" in gpu and n * k >= WIDE else 1.0
        for kind, asked in zip(KINDS, figures, strict=True):
            r = best.get((n, k, kind, 1))
            found, how = (None, "") if r is None else (r["median_us"], r["algorithm"])
            goals.append(Goal(f"{n}x{k} {kind}, 1 token", asked / faster, "us", found, how=how, record=r))
    return goals


def _widths(best: Mapping[tuple[int, int, str, int], Found]) -> list[Goal]:
    ones = [r for (n, k, kind, m), r in best.items() if m == 1 and n * k >= WIDE and bits_of(kind) >= 2]
    values = [(r["bandwidth_percent"], r) for r in ones]
    return [_at_least("of the copy bandwidth, 8192x8192 and larger, 2 bits and more", BANDWIDTH_PERCENT, values, "%")]


def _flatness(best: Mapping[tuple[int, int, str, int], Found]) -> list[Goal]:
    goals = []
    for n, k in H100_US:
        ratios = [
            (r["median_us"] / best[n, k, kind, 1]["median_us"], r)
            for kind in KINDS
            for m in FEW_TOKENS
            if (r := best.get((n, k, kind, m))) is not None and (n, k, kind, 1) in best
        ]
        found, how = _extreme(ratios, max)
        goals.append(Goal(f"{n}x{k}, 2 to 8 tokens over 1", FEW_TOKENS_RATIO, "x", found, how=how))
    return goals


def _textbook(records: Sequence[Found]) -> list[Goal]:
    return [
        _at_least(
            f"{algorithm} over the textbook LUT-GEMM, 1 token",
            1.0,
            [
                (r["speedup"].get(f"textbook_{bits_of(kind_of(r))}bit"), r)
                for r in records
                if (r["algorithm"], r["op"], r["M"]) == (algorithm, op, 1)
            ],
        )
        for algorithm, op in NAMED.items()
    ]


def _against_others(records: Sequence[Found]) -> list[Goal]:
    """What "auto" takes, beside cuBLAS and beside the packages."""
    taken = [r for r in records if r.get("auto")]
    goals = [
        _at_least(
            f"auto over cuBLAS fp16, {m} token{'s' * (m > 1)}",
            asked,
            [(r["speedup"].get("torch_fp16"), r) for r in taken if r["M"] == m],
        )
        for m, asked in OVER_CUBLAS.items()
    ]
    few = [r for r in taken if r["M"] <= PEER_TOKENS and bits_of(kind_of(r)) <= PEER_BITS]
    for package, baselines in PEERS.items():
        ratios = [
            (r["speedup"].get(name), r) for r in few for name, bits in baselines.items() if bits >= bits_of(kind_of(r))
        ]
        goals.append(_at_least(f"auto over {package}, up to 16 tokens and 3 bits", 1.0, ratios))
    return goals


def _block(runs: Iterable[Mapping[str, Any]], gpu: str) -> list[Goal]:
    """The fastest way to run a block of Llama 3.1 8B with weights of 2 bits."""
    ways = ("bcq 2-bit", "codebook 1x4x8", "codebook 2x8x8")
    found = [
        (b["timing"]["median_us"], f"{b['weights']} {b['dtype']}")
        for run in runs
        for b in run.get("block", ())
        if run["header"]["gpu"] and b["model"] == "llama-3.1-8b" and b["timing"] and b["weights"] in ways
    ]
    us, how = min(found, default=(None, ""))
    return [Goal("Llama 3.1 8B block at 2 bits, 1 token", BLOCK_US, "us", us, how=how)]


def _triton(cuda: Sequence[Found], triton: Sequence[Found]) -> list[Goal]:
    beside, own = fastest(cuda), fastest(triton)
    ratios = [
        (r["median_us"] / beside[key]["median_us"], r)
        for key, r in own.items()
        if key in beside and key[3] <= TRITON_TOKENS and key[0] * key[1] >= WIDE
    ]
    found, how = _extreme(ratios, max)
    few = [r for key, r in own.items() if key[3] <= TRITON_TOKENS]
    many = [r for key, r in own.items() if key[3] >= 256]
    return [
        Goal("triton over cuda, up to 8 tokens, 8192x8192 and larger", TRITON_RATIO, "x", found, how=how),
        _at_least(
            "triton over gemlite of as many bits, up to 8 tokens",
            1.0,
            [(r["speedup"].get(f"gemlite_{bits_of(kind_of(r))}bit"), r) for r in few],
        ),
        _at_least(
            "triton over cuBLAS fp16, 256 tokens and more",
            TRITON_OVER_CUBLAS,
            [(r["speedup"].get("torch_fp16"), r) for r in many],
        ),
    ]


def goals(runs: Sequence[Mapping[str, Any]], gpu: str = "") -> list[Goal]:
    """Every figure asked for, with what the runs have of it. gpu: the device's name; an H200's goals are higher."""
    cuda, triton = counted(runs, "cuda"), counted(runs, "triton")
    best = fastest(cuda)
    return [
        *_times(best, gpu),
        *_widths(best),
        *_flatness(best),
        *_textbook(cuda),
        *_against_others(cuda),
        *_block(runs, gpu),
        *_triton(cuda, triton),
    ]


def gpu_of(runs: Iterable[Mapping[str, Any]]) -> str:
    """Name of the GPU of the first run that has one, or ""."""
    return next((str(run["header"]["gpu"]["name"]) for run in runs if run["header"].get("gpu")), "")


def summary(found: Sequence[Goal]) -> str:
    """How many are reached, missed and pending."""
    counts = [sum(goal.verdict == verdict for goal in found) for verdict in ("reached", "missed", "pending")]
    return "figures asked for: {} reached, {} missed, {} pending".format(*counts)


def text(found: Sequence[Goal]) -> str:
    """One line for each goal, and the summary."""
    rows = [(g.verdict, g.what, g.found_text, g.asked_text, g.how) for g in found]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, summary(found)])


def markdown(found: Sequence[Goal]) -> str:
    """A table for a page; what was missed is in bold."""
    rows = [["figure", "asked", "found", "by or at"], ["---"] * 4]
    for g in found:
        shown = f"**{g.found_text}**" if g.reached is False else g.found_text if g.reached else "pending"
        rows.append([g.what, g.asked_text, shown, g.how])
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", summary(found)])


def load(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The runs of those files that are there."""
    return [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lutgemm.bench.goals", description=(__doc__ or "").partition(":")[0])
    runs_help = "what lutgemm bench --json wrote; without any, all goals are listed as pending"
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN.json", help=runs_help)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(argv)
    runs = load(args.runs)
    if args.runs and not runs:
        print(f"none of {', '.join(map(str, args.runs))} exists: nothing was measured")
        return 1
    gpu = gpu_of(runs)
    shown = (markdown if args.markdown else text)(goals(runs, gpu))
    print(f"{gpu or 'no GPU'}\n{shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
