"""One picture of a run: a roofline, and how many times faster than torch bf16 everything was."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutgemm.checkpoint.atomic import write_file
from lutgemm.errors import ArgumentError

from .baselines import BASELINES
from .records import BaselineRecord, Record
from .runner import baselines_of

REFERENCE = "torch_bf16"
INK = "#374151"
OURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, told apart by colour-blind eyes; bars and lines of ours, in the order of their names."""
PEER = "#8d96a3"
PEER_MARKERS = ("s", "D", "^", "v", "<", ">", "P", "X", "p", "h")


@dataclass(frozen=True)
class Point:
    """One measured call. us: the 10th percentile of its times, which other processes disturb less than the median."""

    M: int
    us: float
    nbytes: int
    operations: int

    @property
    def intensity(self) -> float:
        """Operations per byte moved."""
        return self.operations / self.nbytes

    @property
    def gflops(self) -> float:
        return self.operations / self.us / 1e3


def _point(record: Record | BaselineRecord) -> Point:
    assert record.timing is not None
    shape = record.case if isinstance(record, Record) else record
    return Point(shape.M, record.timing.p10_us, record.bytes_moved, 2 * shape.M * shape.N * shape.K)


def _best(points: dict[int, Point], found: Point) -> None:
    """Keep the fastest of each number of tokens."""
    points[found.M] = min(points.get(found.M, found), found, key=lambda point: point.us)


@dataclass(frozen=True)
class Picture:
    """What is drawn: one shape, mode and number of threads; series name -> tokens -> its fastest point."""

    title: str
    read_gb_per_s: float
    ours: dict[str, dict[int, Point]]
    peers: dict[str, dict[int, Point]]

    @classmethod
    def of(cls, header: dict[str, Any], records: Sequence[Record]) -> Picture:
        """The most measured shape and group size, cold and with the fewest threads where there is a choice.

        Raises `ArgumentError` when nothing was timed.
        """
        timed = [r for r in records if r.timing is not None]
        if not timed:
            raise ArgumentError("plot: no correct result was timed, so there is nothing to draw")
        mode = min(r.mode for r in timed)
        threads = min(r.threads for r in timed)
        timed = [r for r in timed if (r.mode, r.threads) == (mode, threads)]
        shape, _ = Counter(r.case.layout.shape for r in timed).most_common(1)[0]
        timed = [r for r in timed if r.case.layout.shape == shape]
        group, _ = Counter(r.case.layout.group_size for r in timed).most_common(1)[0]
        ours: dict[str, dict[int, Point]] = {}
        for r in sorted(timed, key=lambda r: (r.case.op, r.bits_per_weight)):
            if r.case.layout.group_size == group:
                name = f"lutgemm {'codebook ' if r.case.op == 'codebook_linear' else ''}{r.weights}"
                _best(ours.setdefault(name, {}), _point(r))
        peers: dict[str, dict[int, Point]] = {}
        for b in sorted(baselines_of(timed), key=lambda b: list(BASELINES).index(b.name)):
            if b.timing is not None:
                _best(peers.setdefault(BASELINES[b.name].label, {}), _point(b))
        where = "weights from memory" if mode == "cold" else "weights in the caches if they fit"
        title = (
            f"{header['cpu']}, {shape[0]}x{shape[1]}, {where}, {threads} thread{'s' * (threads > 1)}, 10th percentiles"
        )
        return cls(title, max(r.memory.read_gb_per_s for r in timed), ours, peers)


def _draw_roofline(axes: Any, picture: Picture) -> None:
    """Speed against intensity, both logarithmic; a series joins its numbers of tokens."""
    drawn = [*picture.ours.values(), *picture.peers.values()]
    intensities = [p.intensity for points in drawn for p in points.values()]
    low, high = min(intensities) / 1.6, max(intensities) * 1.6
    if picture.read_gb_per_s:
        line = (low, high), (low * picture.read_gb_per_s, high * picture.read_gb_per_s)
        axes.plot(*line, color=INK, lw=1.2, ls="--", label=f"memory, {picture.read_gb_per_s:.0f} GB/s")
    for (name, points), marker in zip(picture.peers.items(), PEER_MARKERS, strict=False):
        places = [(p.intensity, p.gflops) for _, p in sorted(points.items())]
        axes.plot(*zip(*places, strict=True), color=PEER, lw=0.6, marker=marker, ms=5, mfc="white", label=name)
    for (name, points), color in zip(picture.ours.items(), OURS, strict=False):
        places = [(p.intensity, p.gflops) for _, p in sorted(points.items())]
        axes.plot(*zip(*places, strict=True), color=color, lw=1.4, marker="o", ms=6.5, label=name, zorder=3)
    tokens = sorted({m for points in drawn for m in points})
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    speeds = [p.gflops for points in drawn for p in points.values()]
    axes.set_ylim(min(speeds) / 1.6, max(speeds) * 1.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("operations per byte moved (log)", color=INK)
    axes.set_ylabel("billion operations per second (log)", color=INK)
    joined = f"; points of a line: M = {', '.join(map(str, tokens))}" if len(tokens) > 1 else f", M = {tokens[0]}"
    axes.set_title(f"Roofline{joined}", fontsize=10, color=INK)
    axes.grid(True, color="#e5e7eb", lw=0.6)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), labelcolor=INK)


def _draw_bars(axes: Any, picture: Picture) -> None:
    """Times of torch bf16 over those of everything else, at the fewest tokens; times alone where bf16 did not run."""
    tokens = min(m for points in picture.ours.values() for m in points)
    colors = dict(zip(picture.ours, OURS * len(picture.ours), strict=False))
    times = {n: points[tokens].us for n, points in {**picture.ours, **picture.peers}.items() if tokens in points}
    names = sorted(times, key=lambda name: times[name])
    reference = times.get(BASELINES[REFERENCE].label)
    values = [times[name] if reference is None else reference / times[name] for name in names]
    bars = axes.barh(names, values, color=[colors.get(name, PEER) for name in names], height=0.72)
    labels = [f"{times[n]:.0f} us" if reference is None else f"{v:.1f}x" for n, v in zip(names, values, strict=True)]
    if reference is not None:
        labels = [f"{label}  ({times[name]:.0f} us)" for label, name in zip(labels, names, strict=True)]
        axes.axvline(1, color=INK, lw=0.8, ls="--", zorder=0)
    axes.bar_label(
        bars, labels=labels, padding=5, fontsize=8.5, color=INK, bbox={"fc": "white", "ec": "none", "pad": 1}
    )
    axes.set_xlim(0, max(values) * 1.28)
    axes.invert_yaxis()
    what = "microseconds a call" if reference is None else "times faster than torch bf16"
    axes.set_xlabel(what, color=INK)
    axes.set_title(f"M = {tokens}: {what}", fontsize=10, color=INK)


def save_plot(path: Path, header: dict[str, Any], records: Sequence[Record]) -> None:
    """Draw the run as a PNG. Raises `ArgumentError` without matplotlib or without times."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError(f"plot: {error}; install it with: pip install 'lutgemm[bench]'") from None
    picture = Picture.of(header, records)
    count = len(picture.ours) + len(picture.peers)
    figure = Figure(figsize=(15, max(4.6, 1.8 + 0.3 * count)), layout="constrained")
    FigureCanvasAgg(figure)
    roofline, bars = figure.subplots(1, 2, width_ratios=(1.1, 1))
    for axes in (roofline, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    _draw_roofline(roofline, picture)
    _draw_bars(bars, picture)
    figure.suptitle(f"{picture.title}; torch {header['torch']}, {header['date'][:10]}", fontsize=10.5, color=INK)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_file(path, drawn.getvalue())
