"""Measures on this machine which algorithm is faster up to which M: the thresholds of `backends/heuristics.py`.

A weight's algorithms are timed in turns at a few M each. Look-ups against `dequantize`, and its two ways, tiles and
panels, against each other: each gets a line of time against M, and the threshold is where the lines cross. `lut_gemm`
(token by token) against `biqgemm` (many tokens a pass): the last of a few small M at which it was faster.
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from . import __version__
from .accuracy import ACCURACIES, DEFAULT, EXACT
from .backends import Problem, cpu, tuned
from .backends.heuristics import NO_CROSSING, Threshold, look_up_cost
from .errors import BackendError
from .ops import linear
from .testing.cases import OpCase
from .testing.hardware import cpu_model
from .testing.timing import time_interleaved, torch_threads

SIZE, SECONDS = 4096, 100.0
QUICK_SIZE, QUICK_SECONDS = 2048, 16.0
"""N = K of the weights, and about how long all timings take; making the weights comes on top."""
MIN_SIZE = 256
"""Weights are halved down to this on a machine that is too slow for the time."""

BITS = (1, 2, 3, 4, 6, 8)
CODEBOOKS = ((1, 8), (1, 4), (2, 4), (4, 4), (4, 2))
"""num_codebooks and vec_len, 8 bits each: costs of 1, 2, 4, 8 and 16."""
FEW_TOKENS = (1, 2, 3, 4, 6, 8)
MANY_TOKENS = (16, 48, 128)
"""M at which `lut_gemm`, and `dequantize`, is compared; these are whole passes of the look-up kernels, of 16 tokens."""
LONGEST = 4096
"""Lines that cross beyond this many tokens are not known to cross: the threshold is `NO_CROSSING`."""

DTYPES = (torch.float32, torch.bfloat16)
TILES = {"fast": "tiles, fast", "accurate": "tiles, accurate"}
"""Accuracy -> what the tiles of `dequantize` are called in `Timed`."""
ROUND_CALLS = 12
"""One round over all timings of a weight takes about as long as so many times `biqgemm` and `dequantize` at the most
tokens and 4 bits."""
ROUNDS = 2


class Timed(NamedTuple):
    """One of the callables that are timed for a weight."""

    algorithm: str
    """`dequantize` stands for its panels, which torch multiplies, a name in `TILES` for its tiles"""
    integer_tables: bool
    dtype: torch.dtype
    M: int


Times = Mapping[Timed, float]
"""Microseconds."""


@dataclass(frozen=True)
class Study:
    """A weight, what a look-up in it costs, and what was measured."""

    case: OpCase
    cost: float
    times: Times


def fit_line(times: Mapping[int, float]) -> tuple[float, float]:
    """(start, slope) of the line `start + slope * M` closest to times by M in relative terms. Needs two M or more."""
    weights = {m: 1 / t**2 for m, t in times.items()}
    total = sum(weights.values())
    mean_m = sum(w * m for m, w in weights.items()) / total
    mean_t = sum(w * times[m] for m, w in weights.items()) / total
    spread = sum(w * (m - mean_m) ** 2 for m, w in weights.items())
    slope = sum(w * (m - mean_m) * (times[m] - mean_t) for m, w in weights.items()) / spread
    return mean_t - slope * mean_m, slope


def crossing(look_up: Mapping[int, float], dense: Mapping[int, float]) -> int:
    """The largest M up to which the line of `look_up` is below that of `dense`: 0 for none, or `NO_CROSSING`.

    Both are times by M. A look-up that starts above and gains is taken at its word at the largest M measured.
    """
    (start, slope), (dense_start, dense_slope) = fit_line(look_up), fit_line(dense)
    if slope <= dense_slope:
        last = max(look_up)
        return NO_CROSSING if start + slope * last <= dense_start + dense_slope * last else 0
    found = (dense_start - start) / (slope - dense_slope)
    return NO_CROSSING if found > LONGEST else max(0, math.floor(found))


def last_win(ratios: Mapping[int, float]) -> int:
    """The largest M up to which all of these ratios of time, by M, are below 1: 0 for none."""
    won = 0
    for m in sorted(ratios):
        if ratios[m] >= 1:
            break
        won = m
    return won


def falling(tokens: Sequence[int]) -> list[int]:
    """The nearest thresholds that never rise with cost: neighbours in the wrong order share their geometric mean.

    What `CPU_THRESHOLDS` can say, as a row is for all costs up to its own.
    """
    ceiling = 2 * LONGEST
    pools: list[list[float]] = []
    for value in tokens:
        pools.append([math.log(min(value, ceiling) + 1)])
        while len(pools) > 1 and statistics.fmean(pools[-2]) < statistics.fmean(pools[-1]):
            last = pools.pop()
            pools[-1].extend(last)
    means = [round(math.exp(statistics.fmean(pool))) - 1 for pool in pools for _ in pool]
    return [NO_CROSSING if mean > LONGEST else mean for mean in means]


def _problem(case: OpCase, m: int, dtype: torch.dtype, accuracy: int) -> Problem:
    planes = case.bits if case.op == "bcq_linear" else case.num_codebooks
    shape = (m, case.N, case.K, case.group_size, planes)
    return Problem(case.op, "cpu", dtype, *shape, case.scale_kind, case.vec_len, case.codebook_bits, accuracy)


def _accuracies(case: OpCase) -> dict[bool, str]:
    """Which rows of thresholds there are -> the accuracy they are measured at: the default one where they serve it."""
    found: dict[bool, str] = {}
    for name in (DEFAULT, ACCURACIES[EXACT]):
        found.setdefault(cpu.integer_tables(_problem(case, 1, torch.float32, ACCURACIES.index(name))), name)
    return found


def _tokens(op: str, algorithm: str) -> tuple[int, ...]:
    """The M at which an algorithm is timed."""
    if algorithm == "lut_gemm":
        return FEW_TOKENS
    return FEW_TOKENS + MANY_TOKENS if algorithm == "biqgemm" else MANY_TOKENS


def measure_weight(case: OpCase, seconds: float) -> Times:
    """Every algorithm on a weight of this case, in about `seconds` or one round. The 10th percentile of each."""
    weight = case.weight()
    calls: dict[Timed, list[partial[torch.Tensor]]] = {}
    for dtype in DTYPES:
        xs = {m: torch.randn(m, case.K).to(dtype) for m in FEW_TOKENS + MANY_TOKENS}
        for algorithm in cpu.BACKEND.algorithms[case.op]:
            exact = {False: ACCURACIES[EXACT]}  # panels have no tables
            for integer, accuracy in (_accuracies(case) if algorithm != "dequantize" else exact).items():
                call = partial(linear, backend=cpu.BACKEND.name, algorithm=algorithm, accuracy=accuracy)
                for m in _tokens(case.op, algorithm):
                    calls[Timed(algorithm, integer, dtype, m)] = [partial(call, xs[m], weight)]
        for accuracy, name in TILES.items():
            if cpu.has_tiles(case.op, ACCURACIES.index(accuracy)):
                call = partial(linear, backend=cpu.BACKEND.name, algorithm="dequantize", accuracy=accuracy)
                for m in MANY_TOKENS:
                    calls[Timed(name, True, dtype, m)] = [partial(call, xs[m], weight)]
    # Other processes only ever add to a time, and on a shared machine to many: hence no median.
    with cpu.always_tiles():
        return {name: timing.p10_us for name, timing in time_interleaved(calls, seconds).items()}


def cases(size: int) -> list[OpCase]:
    """The weights to measure, N = K = size."""
    bcq = OpCase(M=1, N=size, K=size, group_size=128)
    books = replace(bcq, op="codebook_linear", codebook_bits=8)
    found = [replace(bcq, bits=bits) for bits in BITS]
    return found + [replace(books, num_codebooks=c, vec_len=v) for c, v in CODEBOOKS]


def _seconds_of_a_round(size: int) -> float:
    """About what one round of a weight of this size takes, told from a smaller one."""
    small = max(MIN_SIZE, size // 4)
    case = OpCase(M=max(MANY_TOKENS), N=small, K=small, group_size=128, bits=4)
    inputs, total = case.inputs(), 0.0
    for algorithm in ("biqgemm", "dequantize"):
        call = partial(linear, inputs.x, inputs.weight, algorithm=algorithm, accuracy=ACCURACIES[EXACT])
        call()
        total += min(timeit.repeat(call, number=1, repeat=3))
    return ROUND_CALLS * total * (size / small) ** 2


def fitting_size(size: int, seconds: float) -> int:
    """`size`, halved until all weights can be timed in so many seconds, or `MIN_SIZE` is reached."""
    while size >= 2 * MIN_SIZE and len(cases(size)) * ROUNDS * _seconds_of_a_round(size) > seconds:
        size //= 2
    return size


def _times(study: Study, algorithm: str, integer: bool, dtype: torch.dtype) -> dict[int, float]:
    """Times by M."""
    key = (algorithm, integer, dtype)
    return {name.M: t for name, t in study.times.items() if (name.algorithm, name.integer_tables, name.dtype) == key}


def _many_tokens(times: Mapping[int, float]) -> dict[int, float]:
    return {m: t for m, t in times.items() if m in MANY_TOKENS}


def _few_token_row(studies: Sequence[Study], integer: bool, device: str, date: str) -> Threshold:
    """The row of `lut_gemm`: one for all bits, by the mean ratio of its time to that of `biqgemm`."""
    tokens: list[int] = []
    for dtype in DTYPES:
        pairs = [(_times(s, "lut_gemm", integer, dtype), _times(s, "biqgemm", integer, dtype)) for s in studies]
        ratios = {m: statistics.geometric_mean(few[m] / many[m] for few, many in pairs) for m in FEW_TOKENS}
        tokens.append(last_win(ratios))
    plain, narrow = tokens
    return Threshold("bcq_linear", "lut_gemm", max(s.cost for s in studies), plain, narrow, integer, device, date)


def _look_up_rows(
    studies: Sequence[Study], op: str, algorithm: str, integer: bool, device: str, date: str
) -> list[Threshold]:
    """The rows of the look-up algorithm for many tokens, from the least cost to the largest."""
    tokens: list[list[int]] = []
    for dtype in DTYPES:
        found = []
        for study in studies:
            dense = _times(study, "dequantize", False, dtype)
            found.append(crossing(_many_tokens(_times(study, algorithm, integer, dtype)), dense))
        tokens.append(falling(found))
    return [
        Threshold(op, algorithm, study.cost, plain, narrow, integer, device, date)
        for study, plain, narrow in zip(studies, *tokens, strict=True)
    ]


def _tile_rows(studies: Sequence[Study], accuracy: str, device: str, date: str) -> list[Threshold]:
    """The rows of `dequantize`: from where its tiles beat `biqgemm`, in fp32, up to where panels beat them."""
    name, ends = TILES[accuracy], []
    for dtype in DTYPES:
        pairs = [(_times(s, name, True, dtype), _times(s, "dequantize", False, dtype)) for s in studies]
        ends.append(falling([crossing(tiles, panels) for tiles, panels in pairs]))
    starts = []
    for study in studies:
        look_up = _many_tokens(_times(study, "biqgemm", True, DTYPES[0]))
        starts.append(crossing(look_up, _times(study, name, True, DTYPES[0])))
    return [
        Threshold(
            "bcq_linear",
            "dequantize",
            study.cost,
            plain,
            narrow,
            integer_tables=True,
            device=device,
            date=date,
            min_tokens=min(NO_CROSSING, start + 1),
            accuracy=accuracy,
        )
        for study, plain, narrow, start in zip(studies, *ends, falling(starts), strict=True)
    ]


def thresholds(studies: Iterable[Study], device: str, date: str) -> tuple[Threshold, ...]:
    """The rows that these times make, in the order of `CPU_THRESHOLDS`."""
    ordered = sorted(studies, key=lambda study: study.cost)
    rows: list[Threshold] = []
    for op, algorithm in (("bcq_linear", "biqgemm"), ("codebook_linear", "codegemm")):
        own = [study for study in ordered if study.case.op == op]
        for integer in (False, True):
            timed = [s for s in own if _times(s, algorithm, integer, DTYPES[0])]
            if timed and algorithm == "biqgemm":
                rows.append(_few_token_row(timed, integer, device, date))
            rows += _look_up_rows(timed, op, algorithm, integer, device, date)
        for accuracy, name in TILES.items():
            tiled = [s for s in own if _times(s, name, True, DTYPES[0])]
            rows += _tile_rows(tiled, accuracy, device, date)
    return tuple(rows)


def measure(
    weights: Sequence[OpCase],
    seconds: float,
    threads: int | None = None,
    progress: Callable[[Sequence[OpCase]], Iterable[OpCase]] = iter,
) -> tuned.Entry:
    """Time every algorithm on `weights` (see `cases`) for about `seconds` in all, with the instruction set in use.

    threads: of torch's pool, None: as it is. progress: goes over the weights and may tell how far. Raises
    `BackendError` when the CPU kernels cannot run here.
    """
    if reason := cpu.BACKEND.unavailable():
        raise BackendError(f"there is nothing to measure, the CPU backend cannot run: {reason}")
    model, isa, date = cpu_model(), cpu.isa(), datetime.date.today().isoformat()
    studies: list[Study] = []
    end = time.perf_counter() + seconds
    with torch_threads(threads) as count:
        for case in progress(weights):
            left = (end - time.perf_counter()) / (len(weights) - len(studies))
            cost = look_up_cost(_problem(case, 1, torch.float32, EXACT))
            studies.append(Study(case, cost, measure_weight(case, max(0.0, left))))
    size = weights[0].N
    rows = thresholds(studies, tuned.where_measured(model, isa, count, size), date)
    return tuned.Entry(model, isa, count, __version__, torch.__version__, date, size, rows)
