"""The tables of `tandem runs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from rich import box
from rich.table import Table
from rich.text import Text

from tandem_protocol.durations import duration
from tandem_protocol.run_state import FAILED, FINISHED, STOPPED

from ..screen import number, printable
from .compare import Compared
from .summary import DEAD, RUNNING, Summary

_STYLES = {RUNNING: "cyan", FINISHED: "green", STOPPED: "yellow", FAILED: "red", DEAD: "red"}
_UNKNOWN = "–"
_LARGE = 1000.0
"""From here on, a number has no decimals."""


def listing(runs: Sequence[Summary]) -> Table:
    """Return one row per run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold", style="bold")
    table.add_column("state", no_wrap=True)
    for name in ("step", "reward", "best evaluation", "duration"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("last change", no_wrap=True)
    for run in runs:
        table.add_row(
            _plain(run.name),
            _state(run),
            _steps(run),
            number(run.reward),
            _evaluation(run),
            _UNKNOWN if run.duration_s is None else duration(run.duration_s),
            _time(run.changed_unix_s),
        )
        for problem in run.problems[:1]:
            table.add_row(Text(f"  {printable(problem)}", style="yellow"))
    return table


def comparison(runs: Sequence[Compared]) -> Table:
    """Return one column per run, and one row per figure that some run has."""
    table = _side_by_side("", runs)
    table.add_row("state", *(_state(run.summary) for run in runs))
    figures = [run.figures for run in runs]
    for name in figures[0]:
        values = [found[name] for found in figures]
        if any(value is not None for value in values):
            table.add_row(name, *map(_figure, values))
    return table


def settings_table(runs: Sequence[Compared], settings: Mapping[str, Sequence[str | None]]) -> Table:
    """Return one row per setting that differs."""
    table = _side_by_side("settings that differ", runs)
    for key, values in settings.items():
        table.add_row(_plain(key), *(_plain(_UNKNOWN if value is None else value) for value in values))
    return table


def _side_by_side(title: str, runs: Sequence[Compared]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, style="dim", overflow="fold")
    for run in runs:
        table.add_column(_plain(f"{run.mark} {run.label}"), justify="right", overflow="fold")
    return table


def _plain(text: str) -> Text:
    """Return a text of a user as it is: in a string, rich would read `[red]` as a colour."""
    return Text(printable(text))


def _state(run: Summary) -> Text:
    return Text(run.state, style=_STYLES.get(run.state, "dim"))


def _steps(run: Summary) -> str:
    if run.step is None:
        return _UNKNOWN
    return f"{run.step}" if run.max_steps is None else f"{run.step}/{run.max_steps}"


def _evaluation(run: Summary) -> str:
    if run.best_evaluation is None:
        return _UNKNOWN
    return f"{number(run.best_evaluation)} at step {run.best_evaluation_step}"


def _time(unix_s: float | None) -> str:
    return _UNKNOWN if unix_s is None else f"{datetime.fromtimestamp(unix_s):%Y-%m-%d %H:%M}"


def _figure(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value:,.0f}" if abs(value) >= _LARGE or value == int(value) else f"{value:.4g}"
