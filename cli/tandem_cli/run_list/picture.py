"""A picture of a comparison: as SVG or PNG with matplotlib, or as an HTML page with plotly. Both are optional."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .compare import Compared

_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")
_POINTS = 2000
"""More steps of a run are averaged."""


def save_image(runs: Sequence[Compared], path: Path) -> None:
    """Write the rewards and evaluations as SVG or PNG.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib as mpl  # imported late: it takes half a second, and is an extra

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "tandem"  # the same runs give the same file
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for run, colour in zip(runs, itertools.cycle(_COLOURS), strict=False):
        points = thinned(run.steps.pairs("reward_mean"))
        label = _name(run).replace("$", r"\$")  # otherwise it begins a formula
        axes.plot([x for x, _ in points], [y for _, y in points], color=colour, label=label, linewidth=1.2)
        evaluated = run.evaluations.pairs("reward_mean")
        axes.plot([x for x, _ in evaluated], [y for _, y in evaluated], "o", color=colour, markersize=5)
    axes.set(xlabel="step", ylabel="reward (dots: evaluation)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def save_html(runs: Sequence[Compared], path: Path) -> None:
    """Write the rewards and evaluations as a page that needs no network: plotly.js is in it, 5 MB.

    Raises:
        OSError: the file cannot be written.
    """
    from plotly.io import write_html  # type: ignore[import-untyped]  # imported late: it takes seconds, and is an extra

    traces = []
    for run, colour in zip(runs, itertools.cycle(_COLOURS), strict=False):
        rewards = {"name": f"{_name(run)}: reward", "mode": "lines", "line": {"color": colour}}
        evaluations = {"name": f"{_name(run)}: evaluation", "mode": "markers", "marker": {"color": colour, "size": 9}}
        traces.append(_trace(thinned(run.steps.pairs("reward_mean"))) | rewards)
        traces.append(_trace(run.evaluations.pairs("reward_mean")) | evaluations)
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "reward"}}}
    write_html({"data": traces, "layout": layout}, path, include_plotlyjs=True, validate=False)


def _trace(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    return {"type": "scatter", "x": [x for x, _ in points], "y": [y for _, y in points]}


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most _POINTS points: the means of several steps each."""
    size = -(-len(points) // _POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _name(run: Compared) -> str:
    return f"{run.mark} {run.label}"
