"""The demo's two pictures: perplexity against size, and decode speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import replacing

COLORS = {"torch": "#6b7280", "lutgemm": "#1d6fb8", "rtn": "#d97706"}
LABELS = {"torch": "torch", "lutgemm": "lutgemm", "rtn": "round-to-nearest of equal bits"}
LABEL_SIDES = {
    "torch": ((0, 8), "center", "bottom"),
    "lutgemm": ((-8, 0), "right", "center"),
    "rtn": ((8, 0), "left", "center"),
}
"""Where a point's name stands, in points from it: the two of a pair, one above the other, go to either side."""
INK = "#374151"
Rows = Sequence[Mapping[str, Any]]


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def plot_perplexity(rows: Rows, path: Path, text: str) -> None:
    """Perplexity (log) against the weights' size on disk (log): down and left is better. A line joins rivals."""
    figure, axes = _axes(8, 5)
    place = {row["name"]: (row["file_bytes"] / 1e6, row["perplexity"]["perplexity"]) for row in rows}
    for row in rows:
        if row["rival"] in place:
            axes.plot(*zip(place[row["name"]], place[row["rival"]], strict=True), color="#9ca3af", lw=0.8, zorder=1)
    for kind, label in LABELS.items():
        points = [place[row["name"]] for row in rows if row["kind"] == kind]
        if points:
            face = "none" if kind == "rtn" else COLORS[kind]
            size = 90 if kind == "rtn" else 46
            axes.scatter(*zip(*points, strict=True), s=size, color=COLORS[kind], facecolors=face, label=label, zorder=3)
    for row in rows:
        (dx, dy), ha, va = LABEL_SIDES[row["kind"]]
        color = COLORS[row["kind"]]
        axes.annotate(
            row["name"],
            place[row["name"]],
            (dx, dy),
            textcoords="offset points",
            ha=ha,
            va=va,
            color=color,
            fontsize=8.5,
        )
    axes.set(xscale="log", yscale="log")
    sizes = sorted({round(x) for x, _ in place.values()})
    axes.set_xticks(_spaced(sizes), labels=[str(size) for size in _spaced(sizes)])
    axes.minorticks_off()
    axes.margins(x=0.2, y=0.12)
    axes.set_xlabel("weights on disk, MB (log)", color=INK)
    axes.set_ylabel("perplexity (log), lower is better", color=INK)
    axes.set_title(f"Perplexity on {text}", fontsize=10, color=INK)
    axes.grid(True, axis="y", color="#e5e7eb", lw=0.6)
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _spaced(sizes: Sequence[int]) -> list[int]:
    """Tick positions out of `sizes`: those at least 12 % above the one before."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size >= 1.12 * kept[-1]:
            kept.append(size)
    return kept


def plot_speed(rows: Rows, path: Path, machine: str) -> None:
    """Decode tokens/s of every row as bars, the spread over rounds as a thin line, torch fp32 as a dashed one."""
    figure, axes = _axes(8, 0.42 * len(rows) + 1.5)
    names = [row["name"] for row in rows]
    speeds = [row["speed"]["tokens_per_s"] for row in rows]
    spread = [
        [row["speed"]["tokens_per_s"] - row["speed"]["low"] for row in rows],
        [row["speed"]["high"] - row["speed"]["tokens_per_s"] for row in rows],
    ]
    bars = axes.barh(
        names, speeds, color=[COLORS[row["kind"]] for row in rows], xerr=spread, error_kw={"lw": 0.8, "ecolor": INK}
    )
    axes.bar_label(bars, labels=[f"{s:.1f}" for s in speeds], label_type="center", color="white", fontsize=9)
    fp32 = next((s for row, s in zip(rows, speeds, strict=True) if row["dtype"] == "float32"), None)
    if fp32 is not None:
        axes.axvline(fp32, color=INK, lw=0.8, ls="--", zorder=0)
    axes.invert_yaxis()
    axes.set_xlabel("decode tokens/s, batch 1, higher is better", color=INK)
    axes.set_title(machine, fontsize=10, color=INK)
    _save(figure, path)
