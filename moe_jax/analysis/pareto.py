"""The trade-off as a picture: perplexity over exact against time per token, and against bytes waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_jax.errors import UserError
from moe_jax.outputs import writing

SUFFIXES = ("png", "svg")
LINEAR = 0.1
"""Up to this many % the axis of quality is linear, and logarithmic beyond: weak predictors cost a thousand times what
good ones do, which are what the choice is among."""
_MARKERS = {"exact": "*", "speculative": "o", "speculative_gated": "s", "hybrid": "D", "cache_aware": "^"}


def check() -> None:
    """Raises UserError if matplotlib is missing: better before minutes of measurement than after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError('a plot needs matplotlib: pip install "moe_jax[plot]"') from None


def plot(ways: Sequence[dict[str, Any]], path: str) -> None:
    """Writes `path`.png and `path`.svg.

    Args:
      ways: rows of evaluate.py's table, see `moe_jax.evaluation.quality.row`.
    """
    check()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    predictors = list(dict.fromkeys(way["predictor"] for way in ways))
    axes = figure.subplots(1, 2, sharey=True)
    costs = (("tpot_s", 1e3, "time per token, ms"), ("waited_bytes", 1e-6, "experts waited for, MB per token"))
    for axis, (name, scale, label) in zip(axes, costs, strict=True):
        points = [(scale * way["speed"][name], 100 * (way["quality"]["perplexity_ratio"] - 1)) for way in ways]
        for (x, y), way in zip(points, ways, strict=True):
            color = f"C{predictors.index(way['predictor'])}"
            axis.plot(x, y, _MARKERS[way["mode"]], color=color, markersize=8, alpha=0.8)
        front = pareto_front(points)
        axis.plot(*zip(*front, strict=True), color="gray", linewidth=1, zorder=0)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("symlog", linthresh=LINEAR)
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel(f"perplexity over exact, % (linear up to {LINEAR:g}, then logarithmic)")
    for mode in dict.fromkeys(way["mode"] for way in ways):
        axes[1].plot([], [], _MARKERS[mode], color="black", label=mode)
    for i, name in enumerate(predictors):
        axes[1].plot([], [], "_", color=f"C{i}", markersize=12, markeredgewidth=3, label=f"predictor {name}")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    for suffix in SUFFIXES:
        with writing(f"{path}.{suffix}") as file:
            figure.savefig(file, dpi=150)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is better than in both, by the first coordinate; smaller is better."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
