"""The figures of complete runs, for a comparison."""

from __future__ import annotations

import math
import statistics
import string
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..screen import printable
from ..watch.series import Series
from .summary import RECENT_STEPS, Summary, read_settings, summarize

PLACES = ("trainer.run_name", "trainer.output_dir", "shared.weights_dir", "shared.generators")
"""Settings that say where a run is. They differ between any two runs."""


class Columns(Series):
    """All lines of a file as columns of numbers, read at once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._poll()

    def column(self, name: str) -> list[float]:
        """Return a figure of every line; NaN where a line lacks it."""
        return self._padded(self._columns.get(name, array("d")), 0, self._rows)

    def known(self, name: str) -> list[float]:
        return [value for value in self.column(name) if math.isfinite(value)]

    def timings_s(self) -> float:
        return sum(sum(self.known(name)) for name in self._columns if name.startswith("timings."))

    def pairs(self, name: str) -> list[tuple[float, float]]:
        """Return the step and the figure of every line that has both."""
        rows = zip(self.column("step"), self.column(name), strict=True)
        return [(step, value) for step, value in rows if math.isfinite(step) and math.isfinite(value)]


@dataclass(frozen=True)
class Compared:
    """A run with its figures."""

    mark: str
    """A letter, which stands for the run in a chart."""
    label: str
    summary: Summary
    settings: dict[str, str]
    steps: Columns
    evaluations: Columns

    @property
    def figures(self) -> dict[str, float | None]:
        """The rows of the table. A figure of the policy is the mean over the last RECENT_STEPS steps."""
        steps, seconds = self.steps, self.steps.timings_s()
        tokens = sum(steps.known("rollout_tokens"))
        evaluations = self.evaluations.known("reward_mean")
        return {
            "steps": self.summary.step,
            "reward, last": _recent(steps.known("reward_mean")),
            "reward, best": max(_smoothed(steps.known("reward_mean")), default=None),
            "evaluation, last": evaluations[-1] if evaluations else None,
            "evaluation, best": max(evaluations, default=None),
            "tokens": tokens,
            "hours": seconds / 3600,
            "tokens/s": tokens / seconds if seconds else None,
            "lag, largest": max(steps.known("lag_max"), default=None),
            "kl_sampler": _recent(steps.known("kl_sampler")),
            "entropy": _recent(steps.known("entropy")),
            "grad_norm": _recent(steps.known("grad_norm")),
            "completion_tokens_mean": _recent(steps.known("completion_tokens_mean")),
            "truncated_fraction": _recent(steps.known("truncated_fraction")),
        }

    def as_json(self) -> dict[str, Any]:
        return self.summary.as_json() | {"figures": self.figures}


def read_runs(folders: Sequence[Path]) -> list[Compared]:
    """Read the complete files of some runs."""
    names = Counter(folder.resolve().name for folder in folders)
    marks = string.ascii_uppercase * (len(folders) // len(string.ascii_uppercase) + 1)
    return [_read(folder, mark, names) for folder, mark in zip(folders, marks, strict=False)]


def _read(folder: Path, mark: str, names: Counter[str]) -> Compared:
    name = folder.resolve().name
    return Compared(
        mark=mark,
        label=printable(name if names[name] == 1 else str(folder)),
        summary=summarize(folder),
        settings=read_settings(folder),
        steps=Columns(folder / "metrics.jsonl"),
        evaluations=Columns(folder / "eval.jsonl"),
    )


def differences(runs: Sequence[Compared]) -> dict[str, list[str | None]]:
    """Return the settings that differ: key → value in each run; None where the run does not have it.

    Runs without settings are not compared, and `PLACES` are left out.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in PLACES)
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    known = [bool(run.settings) for run in runs]
    return {key: row for key, row in values.items() if len(set(_only(row, known))) > 1}


def _only(row: Iterable[str | None], known: Iterable[bool]) -> list[str | None]:
    return [value for value, is_known in zip(row, known, strict=True) if is_known]


def _recent(values: Sequence[float]) -> float | None:
    recent = values[-RECENT_STEPS:]
    return statistics.fmean(recent) if recent else None


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of every RECENT_STEPS values in a row; of all values if there are fewer."""
    ends = range(min(RECENT_STEPS, len(values)), len(values) + 1) if values else ()
    return [statistics.fmean(values[max(0, end - RECENT_STEPS) : end]) for end in ends]
