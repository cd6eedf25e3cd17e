"""Checks cases, then times them: every algorithm of every chosen backend beside the baselines, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from lutgemm.backends import registry
from lutgemm.errors import ArgumentError, BackendError
from lutgemm.formats import BCQLayout, CodebookLayout, QuantizedWeight
from lutgemm.ops import linear
from lutgemm.testing.cases import OpCase
from lutgemm.testing.numerics import (
    RELATIVE_ERROR,
    error_bound,
    exact_result,
    mismatch,
    relative_error,
    rms,
    rounded_allowance,
)
from lutgemm.testing.targets import Target, absent, isa_in_use, targets
from lutgemm.testing.timing import (
    Call,
    Timing,
    cold_bytes,
    cold_copies,
    time_interleaved,
    time_interleaved_cuda,
    torch_threads,
)

from .baselines import BASELINES, DEFAULT_BASELINES
from .goals import NAMED
from .layer import Layer, Request, failures
from .machine import copy_bandwidth, device_copy_bandwidth, read_bandwidth
from .records import Bandwidth, BaselineRecord, Record
from .shapes import urgency

MODES = ("cold", "hot")
MOST_LOOKED_UP = 64
"""On GPUs, the most tokens at which the algorithms of tables (`NAMED`) are timed: beyond, they take them in turns,
which is slow beyond doubt. (On CPUs they are of use at any number.)"""


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


def grouped(cases: Sequence[OpCase], urgent_first: bool = False) -> list[list[OpCase]]:
    """The cases that take the same x, together: they are timed in turns with each other and one set of baselines.

    Groups of one shape N x K follow each other, so that prepared layers serve them all; urgent_first: those of one
    shape and `urgency`, so that a run that is cut short has what is wanted most.
    """
    found: dict[tuple[int, int, int], dict[OpCase, list[OpCase]]] = {}
    for case in sorted(cases, key=urgency) if urgent_first else cases:
        same = OpCase(N=case.N, K=case.K, M=case.M, dtype=case.dtype, outliers=case.outliers)
        key = (urgency(case) if urgent_first else 0, case.N, case.K)
        found.setdefault(key, {}).setdefault(same, []).append(case)
    return [group for groups in found.values() for group in groups.values()]


@dataclass
class Shelf:
    """Prepared layers of one shape N x K, kept while groups of that shape are measured."""

    shape: tuple[int, int] = (0, 0)
    layers: dict[tuple[str, Request], Layer | str] = field(default_factory=dict)
    """A string is the reason why it cannot run."""
    weights: dict[tuple[BCQLayout | CodebookLayout, bool], list[QuantizedWeight]] = field(default_factory=dict)

    def turn_to(self, shape: tuple[int, int]) -> None:
        """Let go of layers of another shape."""
        if shape != self.shape:
            self.shape = shape
            self.layers.clear()
            self.weights.clear()

    def layer(self, name: str, request: Request) -> Layer | str:
        """The baseline's prepared layer, or the reason why it cannot run."""
        request = request if BASELINES[name].threaded else replace(request, threads=1)
        key = name, request
        if key not in self.layers:
            try:
                with failures(name):
                    self.layers[key] = BASELINES[name].prepare(request)
            except BackendError as error:
                self.layers[key] = str(error)
        return self.layers[key]

    def copies(self, case: OpCase, device: str, cold: bool) -> list[QuantizedWeight]:
        """The weight of a case: one copy, or enough to exceed the caches."""
        key = case.layout, cold
        if key not in self.weights:
            weight = self.copies(case, device, cold=False)[0] if cold else case.weight().to(device)
            extra = cold_copies(weight.nbytes, cold_bytes(device)) - 1 if cold else 0
            clones = ({name: t.clone() for name, t in weight.tensors.items()} for _ in range(extra))
            self.weights[key] = [weight, *(type(weight)(weight.layout, tensors) for tensors in clones)]
        return self.weights[key]


@dataclass(frozen=True)
class Line:
    """One thing of ours to measure: an algorithm of a target on a case."""

    target: Target
    case: OpCase
    algorithm: str

    def bind(self, x: Tensor, weight: QuantizedWeight) -> Callable[[], Tensor]:
        """The call of the public function, without arguments left."""
        backend = self.target.backend
        return partial(linear, x, weight, backend=backend, algorithm=self.algorithm, accuracy=self.case.accuracy)


@dataclass
class Group:
    """Cases of one x. Truths are worked out once, for all modes and numbers of threads."""

    cases: list[OpCase]
    options: Options
    shelf: Shelf

    def __post_init__(self) -> None:
        first = self.cases[0]
        self.shelf.turn_to((first.N, first.K))
        self.x = replace(first, N=1).inputs().x.to(self.options.device)  # no weight of N x K only for its x
        self.truths: dict[BCQLayout | CodebookLayout, Tensor] = {}
        self.baseline_errors: dict[tuple[str, int], float] = {}
        self.baseline_truths: dict[str, Tensor] = {}

    def fault(self, line: Line, y: Tensor, weight: QuantizedWeight, truth: Tensor) -> str:
        """What is wrong with a result, or ""."""
        case = line.case
        if case.accuracy not in RELATIVE_ERROR:
            return str(mismatch(y, truth, error_bound(self.x, weight, None, line.algorithm), line.algorithm) or "")
        if found := mismatch(y, truth, float("inf"), line.algorithm):
            return str(found)
        error = relative_error(y, truth)
        if error <= RELATIVE_ERROR[case.accuracy]:
            return ""
        allowed = rounded_allowance(self.x, weight, None, case.accuracy)
        found_rms = rms(y.double() - truth)
        if found_rms <= allowed:
            return ""
        return f"{line.algorithm}: root mean square error {found_rms:.2e} is above {allowed:.2e} of {case.accuracy!r}"

    def check(self, line: Line, threads: int, memory: Bandwidth) -> Record:
        """The record of a line without its time."""
        case, device = line.case, self.options.device
        weight = self.shelf.copies(case, device, cold=False)[0]
        if case.layout not in self.truths:
            self.truths[case.layout] = exact_result(self.x, weight)
        truth = self.truths[case.layout]
        error = None
        with line.target.active():
            auto = registry()[line.target.backend].choose(case.problem(device)) == line.algorithm
            try:
                with failures(line.algorithm):
                    y = line.bind(self.x, weight)()
                    fault, error = self.fault(line, y, weight, truth), relative_error(y, truth)
            except BackendError as raised:
                fault = str(raised)
                _assert_usable(device, f"{line.algorithm} on {case.name}")
        return Record(
            case=case,
            algorithm=line.algorithm,
            backend=line.target.backend,
            isa=line.target.isa,
            device=device,
            threads=threads,
            mode="",
            bits_per_weight=weight.bits_per_weight,
            bytes_moved=weight.nbytes + self.x.nbytes + case.M * case.N * self.x.element_size(),
            error=error,
            correct=not fault,
            message=fault,
            memory=memory,
            auto=auto,
        )

    def baseline(self, name: str, threads: int, mode: str, memory: Bandwidth) -> tuple[BaselineRecord, Sequence[Call]]:
        """A baseline's record without its time, and its calls; no calls where it is absent or wrong."""
        (m, k), n = self.x.shape, self.shelf.shape[0]
        request = Request(n, k, mode == "cold", threads, self.options.device)
        record = BaselineRecord(name, m, n, k, request.device, threads, mode, memory=memory)
        layer = self.shelf.layer(name, request)
        if isinstance(layer, str):
            return replace(record, absent=layer), ()
        try:
            with failures(name):
                calls = layer.bind(self.x)
                if (name, threads) not in self.baseline_errors:
                    y = torch.as_tensor(calls[0]()).to(request.device)
                    if name not in self.baseline_truths:
                        self.baseline_truths[name] = _product(self.x, layer.dense().to(request.device))
                    self.baseline_errors[name, threads] = relative_error(y, self.baseline_truths[name])
        except BackendError as error:
            return replace(record, absent=str(error)), ()
        record = replace(
            record,
            bits_per_weight=8 * layer.nbytes / (n * k),
            bytes_moved=layer.nbytes + self.x.nbytes + m * n * self.x.element_size(),
            error=self.baseline_errors[name, threads],
            bound=BASELINES[name].bound(self.x),
        )
        return record, calls if record.correct else ()

    def measure(
        self, target: Target, checked: dict[Line, Record], threads: int, mode: str, memory: Bandwidth
    ) -> list[Record]:
        """The checked lines of one target with their times, the correct ones in turns with the baselines."""
        cold, device = mode == "cold", self.options.device
        beside = {name: self.baseline(name, threads, mode, memory) for name in self.options.baselines}
        calls: dict[str | Line, Sequence[Call]] = {name: found for name, (_, found) in beside.items() if found}
        for line, record in checked.items():
            if record.correct:
                copies = self.shelf.copies(line.case, device, cold)
                calls[line] = [line.bind(self.x, weight) for weight in copies]
        with target.active():
            timings, failed = timed(calls, self.options.seconds * len(self.cases), device)
        baselines = tuple(
            replace(record, timing=timings.get(name), absent=failed.get(name, record.absent))
            for name, (record, _) in beside.items()
        )
        found = [replace(r, mode=mode, timing=timings.get(line), baselines=baselines) for line, r in checked.items()]
        return [
            replace(record, correct=False, message=failed[line]) if line in failed else record
            for line, record in zip(checked, found, strict=True)
        ]


def timed(
    calls: Mapping[str | Line, Sequence[Call]], seconds: float, device: str
) -> tuple[dict[str | Line, Timing], dict[str | Line, str]]:
    """What the clock of the device says of all that can be timed, and why the others cannot: not everything that can be
    called can be captured in a CUDA graph, or has the memory for as many copies.
    """
    clock = time_interleaved_cuda if device == "cuda" else time_interleaved
    if not calls:
        return {}, {}
    try:
        with failures("timing"):
            return clock(calls, seconds), {}
    except BackendError as together:
        failed: dict[str | Line, str] = {}
        for name, copies in calls.items():
            try:
                with failures("timing"):
                    clock({name: copies}, 0.0)
            except BackendError as error:
                failed[name] = str(error)
        left = {name: copies for name, copies in calls.items() if name not in failed}
        if not failed:
            raise together
        return clock(left, seconds) if left else {}, failed


def _assert_usable(device: str, after: str) -> None:
    """Raises `BackendError` where a failed call has taken the whole CUDA context with it."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise BackendError(
            f"{after} left the GPU unusable ({reason}); measure the others in another run, by --algorithms"
        ) from None


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in fp64, in slabs of rows."""
    wide = x.double()
    return torch.cat([wide @ rows.double().T for rows in weight.split(max(1, (8 << 20) // weight.shape[1]))], 1)


def run_group(
    cases: list[OpCase], options: Options, chosen: Sequence[Target], memory: dict[int, Bandwidth], shelf: Shelf
) -> list[Record]:
    """Check, then time cases of one x in every mode with every number of threads."""
    group = Group(cases, options, shelf)
    records: list[Record] = []
    for threads in options.threads:
        bandwidth = memory.get(threads, Bandwidth())
        with torch_threads(threads):
            for target in chosen:
                lines = [
                    Line(target, case, name)
                    for case in cases
                    for name in target.algorithms(case.op)
                    if target.takes(case, name)
                    and (not options.algorithms or name in options.algorithms)
                    and (options.device == "cpu" or case.M <= MOST_LOOKED_UP or name not in NAMED)
                ]
                checked = {line: group.check(line, threads, bandwidth) for line in lines}
                for mode in options.modes if checked else ():
                    records += group.measure(target, checked, threads, mode, bandwidth)
    return records


def run_cases(cases: Sequence[OpCase], options: Options) -> Iterator[tuple[list[OpCase], list[Record]]]:
    """The groups of cases in turn, each with its records. Before each the bandwidth of memory is measured;
    records hold the best so far, as other processes make it less, never more.

    Raises `ArgumentError`, at once, for options that name what is unknown or absent.
    """
    chosen = chosen_targets(options)
    for mode in options.modes:
        if mode not in MODES:
            raise ArgumentError(f"mode={mode!r} is unknown; use some of {list(MODES)}")
    offered = {name for target in chosen for case in cases for name in target.algorithms(case.op)}
    for name in options.algorithms:
        if name not in offered:
            raise ArgumentError(f"algorithms: {name!r} is not offered; use some of {sorted(offered)}")
    return _run_groups(grouped(cases, urgent_first=options.device == "cuda"), options, chosen)


def _run_groups(
    groups: list[list[OpCase]], options: Options, chosen: Sequence[Target]
) -> Iterator[tuple[list[OpCase], list[Record]]]:
    memory: dict[int, Bandwidth] = {}
    shelf = Shelf()
    on_cpu = torch.device(options.device).type == "cpu"
    for group in groups:
        for threads in options.threads:
            with torch_threads(threads):
                found = (read_bandwidth(threads), copy_bandwidth(threads)) if on_cpu else (0.0, device_copy_bandwidth())
            memory[threads] = memory.get(threads, Bandwidth()).best(*found)
        yield group, run_group(group, options, chosen, memory, shelf)


def baselines_of(records: Sequence[Record]) -> list[BaselineRecord]:
    """Each baseline's record once, in the order of the run."""
    return list({id(b): b for record in records for b in record.baselines}.values())
