"""Write the files of a run's folder that people and tools read during the run."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tandem_protocol.repeats import Repeats
from tandem_protocol.run_state import FAILED, FINISHED, STOPPED
from tandem_protocol.version import Version

from .alerts import Change, without_later_alerts
from .events import EventHandler, Events, listening, make_event
from .metrics import JsonLinesWriter

log = logging.getLogger(__name__)

REPEAT_S = 30.0
"""How often to report that a file cannot be written, while that lasts."""

EVALUATION = "evaluation"
NOT_FINITE = "not_finite"
"""The kind of the alert, and of the event if that ends the run."""


class Journal:
    """Metrics, completions, events and status of one run. Only the main process writes; other ranks do nothing."""

    def __init__(self, folder: Path, *, is_main: bool) -> None:
        self._folder = folder
        self._is_main = is_main
        self._metrics = JsonLinesWriter(folder / "metrics.jsonl")
        self._completions = JsonLinesWriter(folder / "rollouts.jsonl")
        self._evaluations = JsonLinesWriter(folder / "eval.jsonl")
        self._events = Events(folder / "events.jsonl")
        self._repeats = Repeats(log)
        self._reported_s: dict[str, float] = {}
        """Name of a file → when it was last reported that it cannot be written."""

    def status(self, phase: str, version: Version) -> None:
        """Write the current phase to `status.json`. The file is replaced atomically, so it is always complete."""
        if self._is_main:
            status = {
                "phase": phase, "step": version.step, "version": str(version), "since_unix_s": time.time(),
            }  # fmt: skip
            temporary = self._folder / ".status.json"
            try:
                temporary.write_text(json.dumps(status))
                temporary.replace(self._folder / "status.json")
            except OSError as error:
                if self._is_news("status.json"):
                    log.warning("status.json cannot be written: %s", error)

    def settings(self, resolved: str) -> None:
        """Write the settings of this start to `config.resolved`."""
        if self._is_main:
            try:
                (self._folder / "config.resolved").write_text(f"{resolved}\n")
            except OSError as error:
                log.warning("config.resolved cannot be written: %s", error)

    @property
    def finished_step(self) -> int:
        """The last step of a finished run; −1 if no trainer has finished it yet."""
        return max((event["step"] for event in self._events.read() if event["kind"] == FINISHED), default=-1)

    def note(self, kind: str, step: int, message: str, **details: Any) -> None:
        """Log an event, and append it to `events.jsonl`."""
        if self._is_main:
            log.info("%s", message)
            self._event("info", kind, step, message, details)

    def progress(self, line: str) -> None:
        """Log one line about the run."""
        if self._is_main:
            log.info("%s", line)

    def alert(self, kind: str, step: int, message: str, **details: Any) -> None:
        """Log an event that needs attention as a warning, unless it repeats, and append it to `events.jsonl`.

        One that repeats is merged there with others of its kind: see `Events`.
        """
        if self._is_main:
            self._repeats.say(logging.WARNING, kind, message, step=step)
            self._event("warning", kind, step, message, details, may_repeat=True)

    def changed(self, step: int, change: Change) -> None:
        """Log an alert that was raised or has ended, and append it to `events.jsonl`."""
        if self._is_main:
            log.log(logging.getLevelNamesMapping()[change.level.upper()], "%s", change.message)
            self._event(change.level, change.name, step, change.message, change.details, may_repeat=True)

    def failed(self, step: int, error: BaseException) -> None:
        """Append to `events.jsonl` that the run ended with an error, which somebody else reports."""
        if self._is_main:
            kind = NOT_FINITE if isinstance(error, FloatingPointError) else FAILED
            message = " ".join(str(error).split()) or type(error).__name__
            self._event("error", kind, step, message, {})

    @contextmanager
    def listening(self, step: Callable[[], int]) -> Iterator[None]:
        """Append what Tandem's packages log as an event during the block, such as a generator that is lost.

        Args:
            step: returns the last finished step.
        """

        def write(kind: str, level: str, message: str, details: Mapping[str, Any]) -> None:
            self._event(level, kind, step(), message, details, may_repeat=True)

        with listening(EventHandler(write)) if self._is_main else nullcontext():
            yield

    def _event(
        self, level: str, kind: str, step: int, message: str, details: Mapping[str, Any], *, may_repeat: bool = False
    ) -> None:
        try:
            self._events.add(make_event(kind, level, step, message, details), may_repeat=may_repeat)
        except OSError as error:  # the event may be about a full disk
            if self._is_news("events.jsonl"):
                log.warning("%s", _kept("events.jsonl", self._events.kept, error))

    def step(self, record: Mapping[str, Any]) -> None:
        """Append the record of a step. If the disk is full, it stays in memory and is written with the next one."""
        if self._is_main:
            try:
                self._metrics.append([record])
            except OSError as error:
                if self._is_news("metrics.jsonl"):
                    self.alert("metrics_failed", record["step"], _kept("metrics.jsonl", self._metrics.kept, error))
            with suppress(OSError):  # `_event` reports it
                self._events.flush()

    def complete(self, record: Mapping[str, Any] | None) -> None:
        """Append the record of the last step if it is missing, because the process ended before `step` was called."""
        if self._is_main and record and self._metrics.last_step() < record["step"]:
            self.step(record)

    def keep(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep completions in memory until the next `completions` or `flush`."""
        if self._is_main:
            self._completions.kept += records

    def completions(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append completions with their rewards. If the disk is full, they stay in memory, as in `step`."""
        if self._is_main:
            try:
                self._completions.append(records)
            except OSError as error:
                if self._is_news("rollouts.jsonl"):
                    log.warning("%s", _kept("rollouts.jsonl", self._completions.kept, error))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Append the record of an evaluation, in the place of an earlier one of the same step.

        If the disk is full, it stays in memory, as in `step`.
        """
        if self._is_main:
            try:
                self._evaluations.forget_after(record["step"] - 1)
                self._evaluations.append([record])
            except OSError as error:
                if self._is_news("eval.jsonl"):
                    self.alert("eval_failed", record["step"], _kept("eval.jsonl", self._evaluations.kept, error))
            reward, prompts = record.get("reward_mean"), f" on {record['n']} prompts" if "n" in record else ""
            shown = "none" if reward is None else f"{reward:.4g}"
            self._event("info", EVALUATION, record["step"], f"Reward {shown}{prompts}.", {})

    def _is_news(self, name: str) -> bool:
        """Whether it was not reported within the last REPEAT_S that this file cannot be written."""
        now_s = time.monotonic()
        if now_s - self._reported_s.get(name, -REPEAT_S) < REPEAT_S:
            return False
        self._reported_s[name] = now_s
        return True

    def flush(self) -> None:
        """Write the lines that are still in memory.

        Raises:
            OSError: the disk is still full.
        """
        for file in (self._metrics, self._completions, self._evaluations):
            file.append(())
        self._events.flush()

    def save(self) -> None:
        """Write what is in memory, as far as the disk takes it: the run ends with an error, or at once."""
        for file in (self._metrics, self._completions, self._evaluations):
            with suppress(OSError):
                file.append(())
        with suppress(OSError):
            self._events.flush(is_end=True)

    def end(self, version: Version, *, finished: bool) -> None:
        """Write the lines that are still in memory, and how the run ended.

        Raises:
            OSError: the lines cannot be written.
        """
        self.flush()
        if self._is_main:
            with suppress(OSError):  # the next line tries again
                self._events.flush(is_end=True)
            if finished:
                self._event("info", FINISHED, version.step, f"the run is finished at step {version.step}", {})
            else:
                self._event("info", STOPPED, version.step, f"the run was asked to stop at step {version.step}", {})
        self.status(FINISHED if finished else STOPPED, version)

    def rewind(self, step: int, record: Mapping[str, Any] | None) -> None:
        """Delete all lines about steps after `step`, and append `record`, the record of `step`, if it is missing.

        Of the events, only alerts are deleted: they are about those lines. All else has happened.
        """
        if self._is_main:
            for file in (self._metrics, self._completions):
                file.forget_after(step)
            self.complete(record)
            self._forget_alerts(step)

    def _forget_alerts(self, step: int) -> None:
        events = list(self._events.read())
        left = without_later_alerts(events, step)
        if len(left) < len(events):
            try:
                self._events.rewrite(left)
            except OSError as error:
                log.warning("events.jsonl has alerts of steps after %d, and cannot be written: %s", step, error)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records of the steps so far."""
        return self._metrics.read()


def _kept(name: str, kept: Sequence[Mapping[str, Any]], error: OSError) -> str:
    return f"{name} cannot be written: {error}. {len(kept)} lines are kept in memory until there is space."
