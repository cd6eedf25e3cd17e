"""Checks a case, then times it: every algorithm of every chosen backend beside the baselines, interleaved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lutgemm.errors import ArgumentError
from lutgemm.formats import QuantizedWeight
from lutgemm.ops import linear
from lutgemm.testing.cases import OpCase
from lutgemm.testing.numerics import error_bound, exact_result, mismatch, relative_error
from lutgemm.testing.targets import Target, absent, isa_in_use, targets
from lutgemm.testing.timing import Call, Timing, cold_copies, time_interleaved, time_interleaved_cuda, torch_threads

from .baselines import BASELINES, DEFAULT_BASELINES
from .machine import read_bandwidth

MODES = ("cold", "hot")


@dataclass(frozen=True)
class Options:
    """What to run of each case. Empty tuples mean: all algorithms; all available backends but the reference."""

    algorithms: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    isas: tuple[str, ...] = ()
    """Instruction sets of the CPU backend, "all", or none for the best that this machine has."""
    threads: tuple[int, ...] = (1,)
    modes: tuple[str, ...] = MODES
    baselines: tuple[str, ...] = DEFAULT_BASELINES
    seconds: float = 1.0
    """Per case, mode and number of threads."""
    device: str = "cpu"


@dataclass(frozen=True)
class Record:
    """One measured line. Times are None when the result was wrong: nothing is timed that failed its check."""

    case: OpCase
    algorithm: str
    backend: str
    isa: str
    device: str
    threads: int
    mode: str
    bits_per_weight: float
    bytes_moved: int
    """The stored weight once, x and y once."""
    error: float
    """Relative L2 error against fp64."""
    correct: bool
    message: str = ""
    timing: Timing | None = None
    read_gb_per_s: float = 0.0
    """Read bandwidth of memory with as many threads, measured in this run."""
    baselines: dict[str, Timing] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float | None:
        return None if self.timing is None else self.bytes_moved / self.timing.median_us / 1e3

    @property
    def bandwidth_percent(self) -> float | None:
        return None if self.gb_per_s is None or not self.read_gb_per_s else 100 * self.gb_per_s / self.read_gb_per_s

    def speedup(self, baseline: str, statistic: str = "median_us") -> float | None:
        """Time of a baseline over ours, both of the same interleaved run; None where either is missing."""
        if self.timing is None or baseline not in self.baselines:
            return None
        return float(getattr(self.baselines[baseline], statistic) / getattr(self.timing, statistic))

    @property
    def repro(self) -> str:
        """The command that measures this line again."""
        c = self.case
        kind = (
            f"--bits {c.bits} --scale-kind {c.scale_kind}"
            if c.op == "bcq_linear"
            else f"--codebooks {c.num_codebooks}x{c.vec_len}x{c.codebook_bits}"
        )
        isa = f" --isa {self.isa}" if self.isa else ""
        device = "" if self.device == "cpu" else f" --device {self.device}"
        return (
            f"lutgemm bench --op {c.op} --shapes {c.N}x{c.K} {kind} --m {c.M} --group-size {c.layout.group_size} "
            f"--dtype {c.dtype} --algorithms {self.algorithm} --backends {self.backend}{isa}{device} "
            f"--threads {self.threads} --{self.mode}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        c = self.case
        bcq = c.op == "bcq_linear"
        own = {"bits": c.bits, "scale_kind": c.scale_kind} if bcq else {}
        own |= {} if bcq else {k: getattr(c, k) for k in ("num_codebooks", "vec_len", "codebook_bits")}
        timing = self.timing.to_dict() if self.timing else dict.fromkeys(Timing.__dataclass_fields__)
        return {
            "op": c.op,
            "algorithm": self.algorithm,
            "backend": self.backend,
            "isa": self.isa or None,
            "device": self.device,
            "threads": self.threads,
            "mode": self.mode,
            "M": c.M,
            "N": c.N,
            "K": c.K,
            **own,
            "group_size": c.layout.group_size,
            "dtype": c.dtype,
            "bits_per_weight": self.bits_per_weight,
            **timing,
            "bytes_moved": self.bytes_moved,
            "gb_per_s": self.gb_per_s,
            "read_gb_per_s": self.read_gb_per_s,
            "bandwidth_percent": self.bandwidth_percent,
            "speedup_fp32": self.speedup("torch_fp32"),
            "speedup_bf16": self.speedup("torch_bf16"),
            "speedup_fp32_p10": self.speedup("torch_fp32", "p10_us"),
            "speedup_bf16_p10": self.speedup("torch_bf16", "p10_us"),
            "baselines": {name: asdict(t) for name, t in self.baselines.items()},
            "error": self.error,
            "correct": self.correct,
            "message": self.message or None,
            "repro": self.repro,
        }


def chosen_targets(options: Options) -> list[Target]:
    """The backends and instruction sets to run. Raises `ArgumentError` naming what is unknown or absent."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device='cuda' cannot be used: this torch sees no CUDA device; use cpu")
    here, missing = [target for target in targets() if target.runs_on(options.device)], absent()
    names = {target.backend for target in here}
    for name in options.backends:
        if name not in names:
            reason = missing.get(name, f"no such backend for device {options.device}; use some of {sorted(names)}")
            raise ArgumentError(f"backends: {name!r} cannot run: {reason}")
    wanted = options.backends or tuple(sorted(names - {"reference"})) or ("reference",)
    found = [target for target in here if target.backend in wanted]
    isas = [target.isa for target in found if target.isa]
    if options.isas == ("all",):
        return found
    for isa in options.isas:
        if isa not in isas:
            raise ArgumentError(f"isa: {isa!r} cannot run on this machine; use some of {isas} or all")
    kept = options.isas or (isa_in_use(),)
    return [target for target in found if not target.isa or target.isa in kept]


def _copies(weight: QuantizedWeight, cold: bool) -> list[QuantizedWeight]:
    extra = cold_copies(weight.nbytes) - 1 if cold else 0
    clones = ({name: t.clone() for name, t in weight.tensors.items()} for _ in range(extra))
    return [weight, *(type(weight)(weight.layout, tensors) for tensors in clones)]


def _calls(target: Target, algorithm: str, x: Tensor, copies: Sequence[QuantizedWeight]) -> list[Call]:
    return [partial(linear, x, weight, backend=target.backend, algorithm=algorithm) for weight in copies]


def run_case(case: OpCase, options: Options, chosen: Sequence[Target], read_gb_per_s: dict[int, float]) -> list[Record]:
    """Check, then time one case in every mode with every number of threads."""
    inputs = case.inputs()
    x, weight = inputs.x.to(options.device), inputs.weight.to(options.device)
    truth = exact_result(inputs.x, inputs.weight)
    ways: list[tuple[Target, str]] = []
    for target in chosen:
        offered = target.algorithms(case.op)
        ways += [(target, name) for name in offered if not options.algorithms or name in options.algorithms]
    bounds = {name: error_bound(inputs.x, inputs.weight, None, name) for _, name in ways}
    bytes_moved = weight.nbytes + x.nbytes + case.M * case.N * x.element_size()
    records: list[Record] = []
    for threads in options.threads:
        with torch_threads(threads):
            checked = {}
            for target, name in ways:
                with target.active():
                    y = linear(x, inputs.weight.to(options.device), backend=target.backend, algorithm=name).cpu()
                found = mismatch(y, truth, bounds[name], name)
                checked[target, name] = Record(
                    case=case,
                    algorithm=name,
                    backend=target.backend,
                    isa=target.isa,
                    device=options.device,
                    threads=threads,
                    mode="",
                    bits_per_weight=weight.bits_per_weight,
                    bytes_moved=bytes_moved,
                    error=relative_error(y, truth),
                    correct=found is None,
                    message=str(found or ""),
                    read_gb_per_s=read_gb_per_s.get(threads, 0.0),
                )
            for mode in options.modes:
                records += _time(x, weight, mode, options, checked)
    return records


def _time(
    x: Tensor, weight: QuantizedWeight, mode: str, options: Options, checked: dict[tuple[Target, str], Record]
) -> list[Record]:
    """The checked records with times, the correct ones of one target interleaved with the baselines."""
    cold = mode == "cold"
    clock = time_interleaved_cuda if x.device.type == "cuda" else time_interleaved
    baselines = {name: BASELINES[name](x, weight.shape[0], cold) for name in options.baselines}
    out = []
    for target in dict.fromkeys(target for target, _ in checked):
        own = {name: record for (t, name), record in checked.items() if t == target}
        names = [name for name, record in own.items() if record.correct]
        timings: dict[str, Timing] = {}
        if names:
            with target.active():
                copies = _copies(weight, cold)
                calls = {name: _calls(target, name, x, copies) for name in names}
                timings = clock({**baselines, **calls}, options.seconds)
        beside = {name: timings[name] for name in baselines if name in timings}
        for name, record in own.items():
            out.append(replace(record, mode=mode, timing=timings.get(name), baselines=beside))
    return out


def run_cases(cases: Sequence[OpCase], options: Options) -> Iterator[list[Record]]:
    """The records of each case in turn. The bandwidth of memory is measured first."""
    chosen = chosen_targets(options)
    for mode in options.modes:
        if mode not in MODES:
            raise ArgumentError(f"mode={mode!r} is unknown; use some of {list(MODES)}")
    offered = {name for target in chosen for case in cases for name in target.algorithms(case.op)}
    for name in options.algorithms:
        if name not in offered:
            raise ArgumentError(f"algorithms: {name!r} is not offered; use some of {sorted(offered)}")
    bandwidth = {}
    for threads in options.threads if torch.device(options.device).type == "cpu" else ():
        with torch_threads(threads):
            bandwidth[threads] = read_bandwidth(threads)
    for case in cases:
        yield run_case(case, options, chosen, bandwidth)
