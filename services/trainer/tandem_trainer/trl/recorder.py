# ruff: noqa: ARG002 - the arguments of a callback are transformers'
"""Write the files of a run's folder for a TRL script: `metrics.jsonl`, `rollouts.jsonl`, `eval.jsonl`, `status.json`.

A callback writes them from what TRL logs, so they have a line whenever TRL logs (`logging_steps`). The client adds what
TRL does not know: versions, tokens, and where the time went.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import TrainerCallback

from tandem_protocol.config.alerts import AlertsConfig
from tandem_protocol.lock import Held, exclusive
from tandem_protocol.messages import Completion
from tandem_protocol.run_state import FAILED, LOCK_FILE, STOPPED
from tandem_protocol.version import Version

from ..learner.mismatch import EXPECTED_16_BIT
from ..run.alerts import Alerts
from ..run.clock import StepClock
from ..run.journal import Journal
from ..run.measures import Facts
from .client import TandemClient
from .needs import announce
from .stopping import is_stop

log = logging.getLogger(__name__)

LOGGED_COMPLETIONS = 4
"""Number of completions per line of `metrics.jsonl` that are written to `rollouts.jsonl`."""
_REWARDS = ("reward", "objective/scores", "self_distillation/reward_mean")
_RUNTIME = re.compile(r"eval_(.+)_runtime")
"""With several data sets, TRL logs each by itself: some figures with the name of the data set, but not the reward."""
_MISMATCH = "sampling/sampling_logp_difference/mean"


class Tally:
    """What the client has done since the last line of `metrics.jsonl`."""

    def __init__(self) -> None:
        self.clock = StepClock()
        self.version = Version(0, 0)
        """The version that was published last."""
        self.alerts: AlertsConfig | None = AlertsConfig()
        """Limits of the alerts."""
        self.compares = False
        """Whether all generators run the model. The mock does not."""
        self.start()

    def start(self) -> None:
        """Begin the next line."""
        self.clock.start_step()
        self.tokens = self.completions = 0

    def add(self, completions: Iterable[Completion]) -> None:
        """Count completions."""
        for completion in completions:
            self.completions += 1
            self.tokens += len(completion.token_ids)


class RecordedClient(TandemClient):
    """A client that counts and measures, and says at its start which model it needs."""

    tally: ClassVar[Tally]
    run_dir: ClassVar[Path]
    """The run's folder. It is absolute, because a script may change its working directory."""
    is_rehearsal: ClassVar[bool] = False
    """End the script instead of connecting to the generators."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        announce(self.trainer and self.trainer(), is_rehearsal=self.is_rehearsal)
        super().__init__(*args, **kwargs)

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        super().check_server(max(total_timeout, self.settings.trainer.start_timeout_s), retry_interval)
        self.tally.alerts = self.settings.trainer.alerts
        self.tally.compares = all(info.dtype for info in self._infos)

    def _publish(self, table: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> None:
        with self.tally.clock.phase("publish"):
            super()._publish(table, tensors)
        self.tally.version = self._version or self.tally.version

    def _sample(self, prompts: list[list[int]], given: dict[str, Any]) -> list[Completion]:
        with self.tally.clock.phase("wait_for_rollouts"):
            completions = super()._sample(prompts, given)
        self.tally.add(completions)
        return completions


class Recorder(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """Writes the run's folder while one trainer trains."""

    def __init__(self, trainer: Any, tally: Tally, folder: Path) -> None:
        self._trainer, self._tally, self._folder = trainer, tally, folder
        self._alerts = Alerts(None, Facts())
        self._listening = ExitStack()
        self._journal: Journal | None = None
        self._evaluation: dict[str, Any] = {}
        self._lock = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the files. A run that resumes continues them, others rename the files that are there."""
        if not state.is_world_process_zero:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._hold()
        if not state.global_step:
            for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl", "events.jsonl"):
                set_aside(self._folder / name)
        self._journal = Journal(self._folder, is_main=True)
        self._journal.rewind(state.global_step, None)
        if state.global_step:
            self._journal.note("resumed", state.global_step, f"resumed from step {state.global_step}")
        self._alerts = Alerts(self._tally.alerts, Facts(max_grad_norm=getattr(args, "max_grad_norm", None) or 0.0))
        self._alerts.resume(self._journal.records())
        self._listening.close()
        self._listening.enter_context(self._journal.listening(lambda: state.global_step))
        self._journal.status("training", self._tally.version)
        self._tally.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Write a line for what TRL logs."""
        if self._journal is None or not logs:
            return
        step = state.global_step
        if "eval_reward" in logs:
            self._evaluation = evaluation(self._evaluation, step, logs)
            self._journal.evaluation(self._evaluation)
        elif "loss" in logs:
            line = record(self._tally, step, state.max_steps, logs)
            self._journal.step(line | self._check(self._journal, line))
            self._journal.completions(completion_rows(self._trainer, step))
            self._journal.status("training", self._tally.version)
            self._tally.start()

    def _check(self, journal: Journal, line: Mapping[str, Any]) -> dict[str, Any]:
        """Report the alerts that a line raises or ends. Returns the field with those that go on."""
        if self._tally.alerts is None:
            return {}
        difference = line["mismatch"]
        excess = difference / EXPECTED_16_BIT if difference is not None else None
        self._alerts.facts = self._alerts.facts._replace(compares=self._tally.compares, mismatch=excess)
        for change in self._alerts.check(line):
            journal.changed(line["step"], change)
        return {"alerts": dict(self._alerts.active)}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note a checkpoint."""
        if self._journal:
            self._journal.note("checkpoint", state.global_step, "a checkpoint was written")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write how the run ended. `LastStep` has published before."""
        self._listening.close()
        if self._journal:
            self._journal.end(self._tally.version, finished=state.global_step >= state.max_steps)
        self._lock.close()

    def end_with(self, error: BaseException) -> None:
        """Write that the run was stopped, or that it failed. `on_train_end` may not have been reached."""
        self._listening.close()
        if self._journal:
            self._journal.save()
            if not is_stop(error):
                self._journal.failed(self._trainer.state.global_step, error)
            self._journal.status(STOPPED if is_stop(error) else FAILED, self._tally.version)
        self._lock.close()

    def _hold(self) -> None:
        """Hold the lock of the run's folder until the training ends, so that readers see that the run goes on."""
        try:
            self._lock.enter_context(exclusive(self._folder / LOCK_FILE, f"a script, pid {os.getpid()}"))
        except Held as error:
            log.warning(
                "%s is in use by %s too. Fix: give one of them another TANDEM__TRAINER__RUN_NAME.", self._folder, error
            )


def evaluation(earlier: Mapping[str, Any], step: int, logs: Mapping[str, Any]) -> dict[str, Any]:
    """Make the line of `eval.jsonl` for a step.

    Args:
        earlier: The last line. It becomes a part of the new one if it is of the same step, with another data set.
        step: The step.
        logs: What TRL logged.
    """
    found = {"step": step, "reward_mean": logs["eval_reward"], **numbers(logs)}
    rewards = {f"eval_{name[1]}_reward": logs["eval_reward"] for key in logs if (name := _RUNTIME.fullmatch(key))}
    return {**(earlier if earlier.get("step") == step else {}), **found, **rewards}


def record(tally: Tally, step: int, max_steps: int, logs: Mapping[str, Any]) -> dict[str, Any]:
    """Make one line of `metrics.jsonl`: figures with the names of Tandem's own trainer, and everything TRL logged."""
    return {
        "step": step,
        "max_steps": max_steps,
        "version": str(tally.version),
        "reward_mean": next((logs[name] for name in _REWARDS if name in logs), None),
        "mismatch": logs.get(_MISMATCH),
        "completion_tokens_mean": tally.tokens / max(1, tally.completions),
        "rollout_tokens": tally.tokens,
        **figures(tally),
        **numbers(logs),
    }


def figures(tally: Tally) -> dict[str, Any]:
    """Return `timings` and `tokens_per_s`. Only the client's own phases are known; rewards and updates are the rest."""
    found = tally.clock.figures(tally.tokens)
    known = ("wait_for_rollouts_s", "publish_s", "other_s")
    return found | {"timings": {name: found["timings"][name] for name in known}}


def numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries that are numbers."""
    return {name: value for name, value in logs.items() if isinstance(value, int | float)}


def completion_rows(trainer: Any, step: int) -> list[dict[str, Any]]:
    """Return some of the newest completions. Versions of TRL that keep none give none."""
    logs = getattr(trainer, "_logs", None) or getattr(trainer, "_textual_logs", None) or {}
    columns = {name: list(column) for name, column in (logs.get("rewards") or {}).items()}
    weights = [float(weight) for weight in getattr(trainer, "reward_weights", [1.0] * len(columns))]
    advantages = list(logs.get("advantages") or ())
    rows = []
    newest = list(zip(logs.get("prompt", ()), logs.get("completion", ()), strict=False))[-LOGGED_COMPLETIONS:]
    for place, (prompt, completion) in enumerate(newest, start=-len(newest)):
        rewards = {name: column[place] for name, column in columns.items()}
        row = {"step": step, "prompt": text(prompt), "completion": text(completion)}
        row |= {"reward": weighted(rewards.values(), weights), "rewards": rewards}
        rows.append(row | ({"advantage": advantages[place]} if len(advantages) >= -place else {}))
    return rows


def weighted(rewards: Iterable[float | None], weights: Iterable[float]) -> float | None:
    """Return the weighted sum of the rewards, as TRL does: without those that are None or NaN. None if all are."""
    terms = [
        weight * reward
        for reward, weight in zip(rewards, weights, strict=False)
        if reward is not None and not math.isnan(reward)
    ]
    return sum(terms) if terms else None


def text(said: Any) -> str:
    """Return a prompt or completion as text. A conversation gives its messages, one per line."""
    return said if isinstance(said, str) else "\n".join(f"{m.get('content')}" for m in said)


def set_aside(file: Path) -> None:
    """Rename `metrics.jsonl` to the first free of `metrics.1.jsonl`, `metrics.2.jsonl` …, if there is one."""
    if file.exists():
        names = (file.with_name(f"{file.stem}.{n}{file.suffix}") for n in itertools.count(1))
        file.rename(next(name for name in names if not name.exists()))
