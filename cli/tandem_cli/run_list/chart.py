"""A chart of rewards in the terminal: one letter per run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from .compare import Compared

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_MARGIN = 10
"""Columns for the numbers beside the chart."""
_LEAST_WIDTH = 20


def chart(runs: Sequence[Compared], width: int, height: int) -> Text:
    """Draw the reward of each run over its steps. Several steps in a column are averaged.

    Args:
        width: columns of the complete text.
        height: rows of the chart, without axis and legend.
    """
    points = {run.mark: run.steps.pairs("reward_mean") for run in runs}
    known = [point for found in points.values() for point in found]
    if not known:
        return Text("No run has a step with a reward yet.", style="dim")
    columns = max(_LEAST_WIDTH, width - _MARGIN)
    last = max(step for step, _ in known)
    means = {mark: _columns(found, last, columns) for mark, found in points.items()}
    values = [value for found in means.values() for value in found if value is not None]
    low, high = min(values), max(values)
    grid = [[Text(" ") for _ in range(columns)] for _ in range(height)]
    for run, colour in reversed(list(zip(runs, _colours(runs), strict=True))):  # the first run is on top
        for column, value in enumerate(means[run.mark]):
            if value is not None:
                row = round((high - value) / (high - low or 1.0) * (height - 1))
                grid[row][column] = Text(run.mark, style=colour)
    return Text("\n").join(
        [Text("reward", style="bold"), *_rows(grid, low, high), *_axis(columns, last), _legend(runs)]
    )


def _columns(points: Sequence[tuple[float, float]], last: float, columns: int) -> list[float | None]:
    """Return the mean of the points in each column, from step 0 to `last`."""
    found: list[list[float]] = [[] for _ in range(columns)]
    for step, value in points:
        found[round(max(0.0, step) / (last or 1.0) * (columns - 1))].append(value)
    return [sum(values) / len(values) if values else None for values in found]


def _rows(grid: Sequence[Sequence[Text]], low: float, high: float) -> list[Text]:
    last = len(grid) - 1
    labels = {0: high, last // 2: high - (high - low) * (last // 2) / last, last: low}
    shown = [f"{labels[row]:>{_MARGIN - 2}.3g}" if row in labels else " " * (_MARGIN - 2) for row in range(len(grid))]
    return [Text.assemble((f"{label} ┤", "dim"), *cells) for label, cells in zip(shown, grid, strict=True)]


def _axis(columns: int, last: float) -> list[Text]:
    pad = " " * (_MARGIN - 1)
    end = f"{last:,.0f}"
    return [
        Text(f"{pad}└{'─' * columns}", style="dim"),
        Text(f"{pad} step 0{end:>{columns - len('step 0')}}", style="dim"),
    ]


def _legend(runs: Sequence[Compared]) -> Text:
    parts = [(f"{run.mark} {run.label}", colour) for run, colour in zip(runs, _colours(runs), strict=True)]
    return Text("   ").join([Text(" " * (_MARGIN - 3)), *(Text(text, style=colour) for text, colour in parts)])


def _colours(runs: Sequence[Compared]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(runs))]
