"""Measures on the user's GPU which algorithm is the fastest at which M: the thresholds of `backends/gpu_heuristics.py`.

The algorithms of the CUDA backend are timed at a few M each, in CUDA graphs, with copies of a weight that exceed the L2
cache, as in a model of many layers. Their times make, for each class of problems, a list of algorithms by rising M.
Kernels go in steps of M (8 tokens of an mma, 16 of a block, ...), so no line is laid through their times: an algorithm
is taken up to the last M at which it was measured to win.

Has not run on a GPU yet.
"""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import __version__
from .accuracy import ACCURACIES, DEFAULT
from .backends import Backend, Problem, cuda, tuned_gpu
from .backends.gpu_heuristics import GpuThreshold
from .backends.heuristics import NO_CROSSING, look_up_cost
from .errors import BackendError
from .formats import QuantizedWeight
from .ops import linear
from .testing.cases import OpCase
from .testing.timing import Timing, cold_bytes, cold_copies, time_interleaved_cuda

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336))
"""N and K of the weights: a square one, gate and up as one, and down of a model of 8 billion weights.

All are measured for what calls ask for by default, in fp16; the first alone for the rest."""
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
SECONDS = 100.0
"""About how long all replays of graphs take; making weights, layouts and graphs comes on top, and may take longer."""
QUICK_SHAPES = SHAPES[:1]
QUICK_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_SECONDS = 15.0

PLANES = (1, 2, 3, 4, 6, 8)
UNIFORM_BITS = (2, 3, 4, 8)
CODEBOOKS = ((1, 8), (1, 4), (2, 8), (2, 4), (4, 4))
"""num_codebooks and vec_len, 8 bits each: costs of 1, 2, 2, 4 and 8."""

DTYPES = ("float16", "float32")
"""bf16 goes by fp16: the same bytes, the same rate of tensor cores and, at the default accuracy, the same work."""
LEVELS = (DEFAULT, *ACCURACIES[ACCURACIES.index(DEFAULT) + 1 :])
"""The accuracies that are measured; "fast" is no faster here than the default."""
ONE_WAY = ("bit_planes", "dequant_gemm", "dequantize")
"""Algorithms that compute the same way at every accuracy they have: timed once."""

SWITCH = 0.05
"""What an algorithm must gain to be worth a row, as a sum over the measured M of differences of log(time): more than
times vary, and a change of algorithm may cost the memory of another layout of the weight."""
HOPELESS = 1.5
"""An algorithm that takes so many times as long as `dequantize` is not timed at larger M: no other time grows less."""
AGREEMENT = 1e-2
"""Largest difference from what `dequantize` returns, in Euclidean norms."""


class Timed(NamedTuple):
    """One of the callables that are timed for a weight and x `[M, K]`."""

    algorithm: str
    accuracy: str
    dtype: str
    M: int


Clock = Callable[[Mapping[Timed, Sequence[Callable[[], Tensor]]], float], Mapping[Timed, Timing]]
"""As `time_interleaved_cuda`."""
TokenTimes = Mapping[int, Mapping[str, float]]
"""M -> algorithm -> microseconds, of the algorithms that can take the problem."""


class Kind(NamedTuple):
    """What rows are for: a class of problems. In the order of the rows, the first that holds for a problem is its."""

    op: str
    scale_kind: str
    accuracy: str
    x_bytes: int
    cost: float

    @property
    def rank(self) -> tuple[Any, ...]:
        """Sorts kinds: what is special, or asks for less, comes first."""
        return (self.op, self.scale_kind == "", ACCURACIES.index(self.accuracy), self.x_bytes, self.cost)


@dataclass(frozen=True)
class Study:
    """The times of one weight in one class."""

    kind: Kind
    times: TokenTimes


def losses(studies: Iterable[TokenTimes]) -> dict[int, dict[str, float]]:
    """M -> algorithm -> mean over `studies` of log(time / that of the fastest), where all have a time for it."""
    found: dict[int, dict[str, float]] = {}
    studies = list(studies)
    for m in sorted(set.intersection(*(set(times) for times in studies))):
        common = set.intersection(*(set(times[m]) for times in studies))
        fastest = [min(times[m].values()) for times in studies]
        for algorithm in sorted(common):
            ratios = [math.log(times[m][algorithm] / best) for times, best in zip(studies, fastest, strict=True)]
            found.setdefault(m, {})[algorithm] = statistics.fmean(ratios)
    return found


def segments(losses: Mapping[int, Mapping[str, float]]) -> list[tuple[str, int]]:
    """(algorithm, last M it is taken for) by rising M: the least sum of losses, each change of algorithm at `SWITCH`.

    "dequantize" is last, for any M: beyond those measured it cannot be far behind.
    """
    paths: list[tuple[float, list[str]]] = [(0.0, [])]
    for m in sorted(losses):
        longer = []
        for algorithm, loss in losses[m].items():
            ways = [(total + (SWITCH if path and path[-1] != algorithm else 0.0), path) for total, path in paths]
            total, path = min(ways, key=lambda way: way[0])
            longer.append((total + loss, [*path, algorithm]))
        paths = longer
    _, path = min(paths, key=lambda way: way[0])
    last: list[tuple[str, int]] = []
    for m, algorithm in zip(sorted(losses), path, strict=True):
        if last and last[-1][0] == algorithm:
            last.pop()
        last.append((algorithm, m))
    if last and last[-1][0] == "dequantize":
        last.pop()
    return [*last, ("dequantize", NO_CROSSING)]


def thresholds(studies: Iterable[Study], device: str, date: str) -> tuple[GpuThreshold, ...]:
    """The rows that these times make. A kind whose next costlier one has the same rows goes without its own."""
    by_kind: dict[Kind, list[TokenTimes]] = {}
    for study in studies:
        by_kind.setdefault(study.kind, []).append(study.times)
    plans = {kind: segments(losses(by_kind[kind])) for kind in sorted(by_kind, key=lambda kind: kind.rank)}
    kinds = list(plans)
    rows: list[GpuThreshold] = []
    for kind, after in zip(kinds, [*kinds[1:], None], strict=True):
        if after is not None and after[:-1] == kind[:-1] and plans[after] == plans[kind]:
            continue
        for algorithm, tokens in plans[kind]:
            limits = (kind.scale_kind, kind.cost, kind.x_bytes, kind.accuracy)
            rows.append(GpuThreshold(kind.op, algorithm, tokens, device, date, *limits))
    return tuple(rows)


def cases(shapes: Sequence[tuple[int, int]] = SHAPES) -> list[OpCase]:
    """The weights to measure, those of a shape together."""
    found: list[OpCase] = []
    for n, k in shapes:
        bcq = OpCase(M=1, N=n, K=k, group_size=128)
        books = replace(bcq, op="codebook_linear", codebook_bits=8)
        found += [replace(bcq, bits=bits) for bits in PLANES]
        found += [replace(bcq, bits=bits, scale_kind="uniform") for bits in UNIFORM_BITS]
        found += [replace(books, num_codebooks=c, vec_len=v) for c, v in CODEBOOKS]
    return found


def problem_of(row: GpuThreshold) -> Problem:
    """A problem of one token at the limits of a row that `thresholds` made."""
    dtype = {2: torch.float16, 4: torch.float32}[row.max_x_bytes]
    planes, accuracy = round(row.max_cost), ACCURACIES.index(row.max_accuracy)
    shape = (1, *SHAPES[0], 128, planes)
    if row.op == "bcq_linear":
        return Problem(row.op, "cuda", dtype, *shape, row.scale_kind or "free", accuracy=accuracy)
    return Problem(row.op, "cuda", dtype, *shape, vec_len=8, codebook_bits=8, accuracy=accuracy)


def _kind(case: OpCase) -> Kind:
    uniform = case.op == "bcq_linear" and case.scale_kind == "uniform"
    cost = look_up_cost(case.problem("cuda"))
    return Kind(case.op, "uniform" if uniform else "", case.accuracy, case.torch_dtype.itemsize, cost)


def _check(y: Tensor, expected: Tensor, timed: Timed, case: OpCase) -> None:
    """Nothing is timed that is wrong."""
    difference, size = (y.double() - expected.double()).norm(), expected.double().norm()
    if not difference <= AGREEMENT * size:
        raise BackendError(
            f"{timed.algorithm} on {case.name} with M={timed.M} and {timed.dtype} differs from dequantize by "
            f"{float(difference / size):.1e} of the result: please report this, nothing was kept"
        )


def _copies(case: OpCase, device: str) -> list[QuantizedWeight]:
    weight = case.weight().to(device)
    more = cold_copies(weight.nbytes, cold_bytes(device)) - 1
    clones = ({name: t.clone() for name, t in weight.tensors.items()} for _ in range(more))
    return [weight, *(type(weight)(weight.layout, tensors) for tensors in clones)]


def measure_weight(
    case: OpCase,
    backend: Backend,
    device: str,
    tokens: Sequence[int],
    levels: Mapping[str, Sequence[str]],
    seconds: float,
    clock: Clock,
) -> list[Study]:
    """Every algorithm of the backend on a weight of this case, at each of `tokens` and, by dtype, of `levels`.

    Timings take about `seconds`, or one replay of each graph. Raises `BackendError` for a wrong result.
    """
    copies, kind = _copies(case, device), torch.device(device).type
    times: dict[Timed, float] = {}
    hopeless: set[tuple[str, str, str]] = set()
    for dtype, accuracies in levels.items():
        for m in tokens:
            asked = replace(case, M=m, dtype=dtype)
            x = torch.randn(m, case.K).to(device, asked.torch_dtype)
            calls: dict[Timed, list[Callable[[], Tensor]]] = {}
            for algorithm in backend.algorithms[case.op]:
                for accuracy in accuracies[:1] if algorithm in ONE_WAY else accuracies:
                    refused = backend.unsupported(replace(asked, accuracy=accuracy).problem(kind), algorithm)
                    if refused or (algorithm, accuracy, dtype) in hopeless:
                        continue
                    call = partial(linear, backend=backend.name, algorithm=algorithm, accuracy=accuracy)
                    calls[Timed(algorithm, accuracy, dtype, m)] = [partial(call, x, weight) for weight in copies]
            dense = Timed("dequantize", accuracies[0], dtype, m)
            expected = calls[dense][0]()
            for timed, ways in calls.items():
                _check(ways[0](), expected, timed, case)
            share = seconds / (len(tokens) * len(levels))
            found = {timed: timing.median_us for timed, timing in clock(calls, share).items()}
            hopeless |= {timed[:3] for timed, us in found.items() if us > HOPELESS * found[dense]}
            times |= found
    classes = [replace(case, dtype=d, accuracy=a) for d, accuracies in levels.items() for a in accuracies]
    return [Study(_kind(one), _of_class(times, one, backend, kind, levels[one.dtype][0])) for one in classes]


def _of_class(times: Mapping[Timed, float], case: OpCase, backend: Backend, device: str, lowest: str) -> TokenTimes:
    """The times that count at a case's dtype and accuracy; algorithms of `ONE_WAY` were timed at the lowest."""
    found: dict[int, dict[str, float]] = {}
    for timed, us in times.items():
        at = lowest if timed.algorithm in ONE_WAY else case.accuracy
        refused = backend.unsupported(replace(case, M=timed.M).problem(device), timed.algorithm)
        if (timed.dtype, timed.accuracy) == (case.dtype, at) and not refused:
            found.setdefault(timed.M, {})[timed.algorithm] = us
    return found


def measure(
    weights: Sequence[OpCase],
    tokens: Sequence[int] = TOKENS,
    seconds: float = SECONDS,
    index: int = 0,
    progress: Callable[[Sequence[OpCase]], Iterable[OpCase]] = iter,
) -> tuned_gpu.Entry:
    """Time the CUDA backend's algorithms on `weights` (see `cases`), at these M, on the GPU of this index.

    seconds: about how long the replays of all graphs take. progress: goes over the weights and may tell how far.
    Raises `BackendError` when the kernels cannot run here, return something wrong, or find no memory, and in the
    capture of a CUDA graph.
    """
    if reason := cuda.BACKEND.unavailable():
        raise BackendError(f"there is nothing to measure, the CUDA backend cannot run: {reason}")
    if torch.cuda.is_current_stream_capturing():
        raise BackendError("tuning while a CUDA graph is captured would time nothing; tune before, or after")
    with torch.cuda.device(index):
        studies = study(weights, cuda.BACKEND, f"cuda:{index}", tokens, seconds, time_interleaved_cuda, progress)
    gpu, date = tuned_gpu.Gpu.of(index), datetime.date.today().isoformat()
    return tuned_gpu.Entry(gpu, __version__, torch.__version__, date, thresholds(studies, str(gpu), date))


def study(
    weights: Sequence[OpCase],
    backend: Backend,
    device: str,
    tokens: Sequence[int],
    seconds: float,
    clock: Clock,
    progress: Callable[[Sequence[OpCase]], Iterable[OpCase]] = iter,
) -> list[Study]:
    """The times of all weights. Those of the first's shape are measured in all classes, others in the default one."""
    studies: list[Study] = []
    full: dict[str, Sequence[str]] = dict.fromkeys(DTYPES, LEVELS)
    first = (weights[0].N, weights[0].K)
    for case in progress(weights):
        levels = full if first == (case.N, case.K) else {DTYPES[0]: LEVELS[:1]}
        try:
            studies += measure_weight(case, backend, device, tokens, levels, seconds / len(weights), clock)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"the GPU's memory does not hold copies of a weight of {case.N} x {case.K}, {case.name}; "
                "end other processes that use it, or tune with --quick"
            ) from error
    return studies
