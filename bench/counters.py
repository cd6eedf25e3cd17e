"""Hardware counters of the kernels that miss their figure: `python -m lutgemm.bench.counters OUT.json RUN.json ...`.

Each is called once under Nsight Compute, caches flushed and clocks left alone, which takes some seconds. Without `ncu`,
or where the driver keeps the counters to administrators, that is said and nothing is written.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lutgemm.checkpoint.atomic import write_file
from lutgemm.errors import BackendError
from lutgemm.ops import linear

from .goals import Found, Goal, goals, gpu_of, load
from .shapes import BCQ, CODEBOOK

COUNTERS = {
    "us": "gpu__time_duration.sum",
    "bytes from memory": "dram__bytes_read.sum",
    "memory, % of peak": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2, % of peak": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 hits, %": "lts__t_sector_hit_rate.pct",
    "issue slots, %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "shared wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "shared memory, % of peak": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "bank conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "tensor pipe, %": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "warps, % of peak": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "memory stalls per issue": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "shared memory stalls per issue": "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio",
    "barrier stalls per issue": "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "waves": "launch__waves_per_multiprocessor",
}
"""What is shown, and Nsight Compute's name for it; names that its version does not know are left out."""
MOST = 8
"""Figures that are profiled, those that miss by most first."""
SECONDS = 60.0
"""For one of them."""


def find_ncu() -> str | None:
    """Nsight Compute's command, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("ncu") or shutil.which(str(Path(home, "bin", "ncu")))


def missed(found: Sequence[Goal], most: int = MOST) -> list[Goal]:
    """The times that are missed, by how much."""
    own = [goal for goal in found if goal.reached is False and goal.record is not None]
    return sorted(own, key=lambda goal: -(goal.found or 0.0) / goal.asked)[:most]


def known_counters(ncu: str) -> list[str]:
    """Those of `COUNTERS` that this Nsight Compute knows; all of them where it does not tell."""
    ran = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, timeout=SECONDS, check=False)
    names = {line.split()[0] for line in ran.stdout.splitlines() if line.strip()}
    wanted = list(COUNTERS.values())
    if ran.returncode or not names:
        return wanted
    return [name for name in wanted if name.startswith("launch__") or name.partition(".")[0] in names]


def call_once(record: Found) -> None:
    """The call of a record, once before and once while the profiler looks."""
    if record["op"] == "bcq_linear":
        case = replace(BCQ, bits=record["bits"], scale_kind=record["scale_kind"])
    else:
        case = replace(CODEBOOK, **{name: record[name] for name in ("num_codebooks", "vec_len", "codebook_bits")})
    case = replace(case, N=record["N"], K=record["K"], M=record["M"], dtype=record["dtype"])
    x, weight = replace(case, N=1).inputs().x.cuda(), case.weight().to("cuda")
    choice = {"backend": record["backend"], "algorithm": record["algorithm"], "accuracy": record["accuracy"]}
    linear(x, weight, **choice)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    linear(x, weight, **choice)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def parse(text: str) -> list[dict[str, Any]]:
    """The kernels of `ncu --csv --page raw`: a header, a line of units, and one line for each kernel."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    names, _units, *rows = csv.reader(lines[start:])
    kernels = []
    for row in rows:
        values = dict(zip(names, row, strict=False))
        counters = {shown: _number(values[name]) for shown, name in COUNTERS.items() if name in values}
        kernels.append({"kernel": values.get("Kernel Name", "?"), **counters})
    return kernels


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def profile(record: Found, ncu: str, counters: Iterable[str]) -> list[dict[str, Any]]:
    """Counters of every kernel of the record's call. Raises `BackendError` with what ncu says where there are none."""
    own = [sys.executable, "-m", "lutgemm.bench.counters", "--call", json.dumps(record)]
    options = [
        "--profile-from-start",
        "off",
        "--clock-control",
        "none",
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
    ]
    command = [ncu, *options, "--metrics", ",".join(counters), *own]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise BackendError(f"ncu took more than {SECONDS:g} s") from None
    kernels = parse(ran.stdout)
    if kernels:
        return kernels
    said = [line for line in (ran.stdout + ran.stderr).splitlines() if "ERR" in line.upper()]
    raise BackendError(f"ncu counted nothing: {said[0].strip() if said else f'status {ran.returncode}'}")


def shown(goal: Goal, kernels: Iterable[Mapping[str, Any]]) -> str:
    """A figure and the counters of its kernels, as text."""
    lines = [f"{goal.what}: {goal.found_text}, asked {goal.asked_text}, {goal.how}"]
    for kernel in kernels:
        counters = [f"{name} {value:.4g}" for name, value in kernel.items() if isinstance(value, float)]
        lines.append(f"  {kernel['kernel']}: {'; '.join(counters)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lutgemm.bench.counters", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT.json")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN.json", help="what lutgemm bench --json wrote")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.call:
        call_once(json.loads(args.call))
        return 0
    runs = load(args.runs)
    if args.out is None or not runs:
        print("no run to profile: give OUT.json and what lutgemm bench --suite gpu --json wrote")
        return 1
    ncu = find_ncu()
    if ncu is None:
        print("ncu is neither on PATH nor in CUDA_HOME: no counters")
        return 0
    wanted = missed(goals(runs, gpu_of(runs)))
    if not wanted:
        print("no time was missed: nothing to profile")
        return 0
    counters, profiles = known_counters(ncu), []
    for goal in wanted:
        assert goal.record is not None
        try:
            kernels = profile(goal.record, ncu, counters)
        except BackendError as error:
            print(f"{goal.what}: {error}", flush=True)
            continue
        print(shown(goal, kernels), flush=True)
        profiles.append({"what": goal.what, "asked_us": goal.asked, "record": goal.record, "kernels": kernels})
        found = {"header": runs[0]["header"], "profiles": profiles}
        write_file(args.out, f"{json.dumps(found, indent=1)}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
