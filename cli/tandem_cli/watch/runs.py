"""The runs that the page shows: what each is called, and what it is doing."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

from tandem_protocol.config import ConfigError

from .json_lines import parse
from .rollouts import Rollouts
from .series import Series
from .timeline import Timeline

FILES = ("metrics.jsonl", "status.json", "rollouts.jsonl", "eval.jsonl", "events.jsonl")
_MAX_STEPS = re.compile(rb"^trainer\.max_steps +(\d{1,18})", re.MULTILINE)
_SETTINGS_BYTES = 1 << 20


class WatchedRun:
    """The folder of one run. Nothing in it is written, and it need not exist yet."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.steps = Series(folder / "metrics.jsonl")
        self.evaluations = Series(folder / "eval.jsonl")
        self.timeline = Timeline(folder, self.steps)
        self.rollouts = Rollouts(folder / "rollouts.jsonl")
        self._folder = folder

    def state(self) -> dict[str, Any]:
        """Return what the run is doing, and the steps of which it has rollouts."""
        status = parse(self._read("status.json")) or {}
        since_unix_s = status.get("since_unix_s")
        return {
            "name": self.name,
            "exists": is_run(self._folder),
            "phase": status.get("phase"),
            "version": status.get("version"),
            "phase_s": max(0.0, time.time() - since_unix_s) if isinstance(since_unix_s, int | float) else None,
            "step": self.steps.last("step"),
            "max_steps": self.max_steps,
            "rollouts": self.rollouts.span(),
        }

    @property
    def max_steps(self) -> float | None:
        """The number of steps that the run will have. A TRL script says it in its metrics."""
        found = _MAX_STEPS.search(self._read("config.resolved"))
        return float(found[1]) if found else self.steps.last("max_steps")

    def _read(self, name: str) -> bytes:
        with suppress(FileNotFoundError), (self._folder / name).open("rb") as file:
            return file.read(_SETTINGS_BYTES)
        return b""


class AllRuns(Sequence[WatchedRun]):
    """All runs in a folder: first those that are there, the newest first, then each that begins later.

    A run keeps its place. To iterate looks for new runs.
    """

    def __init__(self, folder: Path) -> None:
        """Raise a ConfigError if `folder` is a run itself, or cannot hold one."""
        if is_run(folder) or (folder.exists() and not folder.is_dir()) or not folder.parent.is_dir():
            raise ConfigError(
                f"got --all {folder}, expected a folder with runs in it, such as PROJECT/runs. Fix: correct the "
                f"path; for one run: tandem watch {folder}"
            )
        self._folder = folder
        self._runs: dict[str, WatchedRun] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[WatchedRun]:
        with self._lock:
            inside = (path for path in self._folder.glob("*") if path.name not in self._runs and is_run(path))
            for path in sorted(inside, key=_changed_unix_s, reverse=True):
                self._runs[path.name] = WatchedRun(path, path.name)
            return iter(list(self._runs.values()))

    def __len__(self) -> int:
        return len(self._runs)

    @overload
    def __getitem__(self, index: int) -> WatchedRun: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[WatchedRun]: ...
    def __getitem__(self, index: int | slice) -> WatchedRun | Sequence[WatchedRun]:
        return list(self._runs.values())[index]


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in FILES)


def _changed_unix_s(folder: Path) -> float:
    return max(file.stat().st_mtime for name in FILES if (file := folder / name).exists())


def find_runs(folders: Sequence[Path]) -> list[WatchedRun]:
    """Return the runs of some folders.

    Raises:
        ConfigError: a folder is not the folder of a run and cannot become one.
    """
    for folder in folders:
        _check(folder)
    names = Counter(folder.resolve().name for folder in folders)
    unique = (folder.resolve().name if names[folder.resolve().name] == 1 else str(folder) for folder in folders)
    return [WatchedRun(folder, name) for folder, name in zip(folders, unique, strict=True)]


def _check(folder: Path) -> None:
    if is_run(folder):
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"got {folder}, a file, expected the folder of a run. Fix: tandem watch {folder.parent}")
    inside = sorted(file.parent for file in [*folder.glob("*/metrics.jsonl"), *folder.glob("runs/*/metrics.jsonl")])
    if inside:
        raise ConfigError(
            f"got {folder}, a folder with {len(inside)} runs in it, expected the folders of the runs to show. "
            f"Fix: tandem watch {' '.join(map(str, inside[:4]))}"
        )
    if not folder.parent.is_dir():
        raise ConfigError(
            f"got {folder}, and the folder {folder.parent} does not exist, expected PROJECT/runs/NAME. Fix: correct "
            "the path; a run that has not started yet may be missing, but not the folder for it."
        )
