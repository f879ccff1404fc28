"""One line about a run, from the ends of its files: 100 runs of 10,000 steps take a few seconds."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tandem_protocol.config import read_resolved
from tandem_protocol.run_state import FAILED, FINISHED, STOPPED

from ..run_folder import RunFolder
from ..tail import LINE_BYTES
from ..watch.json_lines import Ends, ends, line_before, parse
from ..watch.runs import FILES

RUNNING, DEAD, EMPTY, UNKNOWN = "running", "dead", "empty", "unknown"
"""States besides the final phases of `status.json`. Empty: nothing is written. Unknown: the status cannot be read."""
RECENT_STEPS = 10
"""The reward of a run is the mean over this many steps: a single step is noisy."""
_BYTES = 1 << 20
_TIMINGS = re.compile(rb'"timings": ?\{([^{}]*)\}')
_SECONDS = re.compile(rb": ?([0-9.eE+-]+)")


@dataclass(frozen=True)
class Summary:
    """What `tandem runs` shows of one run. None: not known."""

    name: str
    path: str
    state: str = UNKNOWN
    phase: str | None = None
    """What the trainer did last, as in `status.json`."""
    step: int | None = None
    max_steps: int | None = None
    reward: float | None = None
    """Mean over the last RECENT_STEPS lines of `metrics.jsonl`."""
    best_evaluation: float | None = None
    best_evaluation_step: int | None = None
    duration_s: float | None = None
    """Seconds that all steps took. Time between a stop and a resume does not count."""
    changed_unix_s: float | None = None
    """When a file of the run was written last."""
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(folder: Path) -> Summary:
    """Read what the list shows of a run. A damaged file is a problem in the result, not an error."""
    problems: list[str] = []
    found = Summary(folder.name or folder.resolve().name, str(folder.absolute()), problems=problems)
    for read in (_from_status, _from_metrics, _from_evaluations, _from_settings):
        try:
            found = read(folder, found)
        except OSError as error:
            problems.append(f"{Path(error.filename or folder).name} cannot be read: {error.strerror}")
    return found


def newest_first(runs: Iterable[Summary]) -> list[Summary]:
    return sorted(runs, key=lambda run: (-(run.changed_unix_s or 0.0), run.name))


def read_settings(folder: Path) -> dict[str, str]:
    """Return the settings in `config.resolved`; an empty dict for the run of a TRL script, which has none."""
    with suppress(FileNotFoundError), (folder / "config.resolved").open(errors="replace") as file:
        return read_resolved(file.read(_BYTES))
    return {}


def _from_status(folder: Path, found: Summary) -> Summary:
    changed_s = [stat.st_mtime for name in FILES if (stat := _stat(folder / name))]
    status: Mapping[str, Any] | None = {}
    with suppress(FileNotFoundError), (folder / "status.json").open("rb") as file:
        status = parse(file.read(_BYTES))
    phase = status.get("phase") if status else None
    if status is None or not isinstance(phase, str | None):
        found.problems.append("status.json is damaged")
        phase = None
    return replace(
        found,
        state=state_of(phase, is_in_use=RunFolder(folder).is_in_use, is_empty=not changed_s),
        phase=phase,
        step=_integer((status or {}).get("step")),
        changed_unix_s=max(changed_s, default=None) or _changed(folder),
    )


def state_of(phase: str | None, *, is_in_use: bool, is_empty: bool) -> str:
    """Return the state of a run from its phase and from whether a process holds its lock."""
    if is_in_use:
        return RUNNING
    if phase in (FINISHED, STOPPED, FAILED):
        return phase
    if phase:
        return DEAD
    return EMPTY if is_empty else UNKNOWN


def _from_metrics(folder: Path, found: Summary) -> Summary:
    file = folder / "metrics.jsonl"
    records, damaged = last_records(file, RECENT_STEPS)
    if damaged:
        found.problems.append(f"metrics.jsonl has {damaged} damaged lines at its end")
    rewards = [reward for record in records if (reward := number(record.get("reward_mean"))) is not None]
    steps = [step for record in records if (step := _integer(record.get("step"))) is not None]
    return replace(
        found,
        step=max([*steps, *([] if found.step is None else [found.step])], default=None),
        max_steps=_integer(records[-1].get("max_steps")) if records else None,
        reward=sum(rewards) / len(rewards) if rewards else None,
        duration_s=total_s(file) if records else None,
    )


def _from_evaluations(folder: Path, found: Summary) -> Summary:
    best: tuple[float, int | None] | None = None
    with suppress(FileNotFoundError), (folder / "eval.jsonl").open("rb") as file:
        while line := file.readline(LINE_BYTES):
            record = parse(line) or {}
            reward = number(record.get("reward_mean"))
            if reward is not None and (best is None or reward > best[0]):
                best = reward, _integer(record.get("step"))
    return replace(found, best_evaluation=best[0], best_evaluation_step=best[1]) if best else found


def _from_settings(folder: Path, found: Summary) -> Summary:
    steps = read_settings(folder).get("trainer.max_steps", "")
    return replace(found, max_steps=int(steps)) if steps.isdecimal() else found


def last_records(path: Path, count: int) -> tuple[list[dict[str, Any]], int]:
    """Return the last records of a JSON Lines file, and how many damaged lines are among them. Reads only its end."""
    records: list[dict[str, Any]] = []
    damaged = 0
    with suppress(FileNotFoundError), path.open("rb") as file:
        start = ends(file, Ends()).complete
        while len(records) + damaged < count and (line := line_before(file, start)):
            record, start = line.record, line.start
            damaged += record is None
            records += [] if record is None else [record]
    return records[::-1], damaged


def total_s(path: Path) -> float:
    """Add up the timings of all steps, without parsing the lines: 10,000 steps take about 0.1 s."""
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(LINE_BYTES), b"")
        return sum(_seconds(found[1]) for line in lines if (found := _TIMINGS.search(line)))


def _seconds(timings: bytes) -> float:
    with suppress(ValueError):
        return sum(filter(math.isfinite, map(float, _SECONDS.findall(timings))))
    return 0.0


def number(value: Any) -> float | None:
    """Return a finite number as it is, and None for all else."""
    with suppress(OverflowError):  # of an integer with hundreds of digits
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def _integer(value: Any) -> int | None:
    return None if number(value) is None else int(value)


def _stat(path: Path) -> Any:
    with suppress(FileNotFoundError, NotADirectoryError):
        return path.stat()
    return None


def _changed(folder: Path) -> float:
    return min(folder.stat().st_mtime, time.time())
