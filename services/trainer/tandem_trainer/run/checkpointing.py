"""When a checkpoint is due, what it holds, and how a run resumes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.queue import Rollouts

from ..learner.learner import Learner
from ..ranks import PartFailed, any_rank, do_together
from ..volumes import free_bytes
from .checkpoint import FORMAT, STATE_FILE, Checkpoints, failure_message, read_state, readable
from .log import RunLog
from .resume import EVALUATION, SAMPLING, SCORING, Changes, compare


class Checkpointing:
    """The checkpoints of a run. Every rank calls its methods at the same time."""

    def __init__(self, config: TrainerConfig, accelerator: Accelerator, log: RunLog) -> None:
        self._config = config
        self._accelerator = accelerator
        self._log = log
        self._checkpoints = Checkpoints(log.dir / "checkpoints", keep=config.checkpoint.keep)
        latest = self._checkpoints.latest()
        self.saved = read_state(latest) if latest else None
        """The state of the newest checkpoint at the start of the process. None if the run had no checkpoint."""
        self._facts: dict[str, Any] = {}
        self._changes = Changes()
        self._best: dict[str, Any] | None = self.saved.get("best") if self.saved else None
        self._step = -1
        """The step of the newest checkpoint."""
        self.may_pass = False
        """Whether the last failure may pass: the disk was full, for example."""

    def compare(self, facts: dict[str, Any]) -> None:
        """Compare `facts` with those of the checkpoint. The next checkpoints hold them.

        Raises:
            UserError: something changed that must not change.
        """
        self._facts = facts
        self._changes = compare(self.saved["facts"] if self.saved else facts, facts, self._log.dir)

    def load(self, learner: Learner, rollouts: Rollouts) -> None:
        """Load the newest checkpoint, if there is one, and report what changed since."""
        directory = self._checkpoints.latest()
        if not (directory and self.saved):
            return
        self._log.step = self._step = self.saved["step"]
        self._log.record = self.saved["record"]
        with readable(directory):
            learner.load(directory)
            rollouts.load_state_dict(
                json.loads((directory / self._rank_file).read_text()),
                sample_again=self._changes.touch(SAMPLING),
                score_again=self._changes.touch(SCORING),
            )
        if self._best and self._changes.touch(EVALUATION):
            self._best = self._best | {"reward_mean": None}  # does not compare with the next evaluations
        self._report_changes(self._step)

    def _report_changes(self, step: int) -> None:
        if not self._changes:
            self._log.journal.progress(f"resumed from step {step}")
            return
        self._log.journal.note(
            "settings_changed",
            step,
            f"resumed from step {step}; changed since: {'; '.join(map(str, self._changes))}",
            changes={change.key: [change.before, change.now] for change in self._changes},
        )

    def due(self, step: int) -> bool:
        """True every `every_steps` steps, at the last step, after the best evaluation or after a failed checkpoint."""
        if step % self._config.checkpoint.every_steps == 0 or step == self._config.max_steps:
            return True
        if self._log.checkpoint_failures:
            return True
        is_best = self._best_with_this is not self._best
        return self._config.checkpoint.keep_best and any_rank(self._accelerator, is_best)

    def write(self, step: int, learner: Learner, rollouts: Rollouts) -> bool:
        """Write everything that `load` needs, unless this step's checkpoint exists. Returns True if it exists now.

        A failure does not end the run. It raises an alert, and the next step tries again.
        """
        if step == self._step:
            return True
        staging = self._checkpoints.staging(step)
        is_main = self._accelerator.is_main_process
        try:
            with self._log.timer("checkpoint"):
                do_together(
                    self._accelerator,
                    lambda: self._checkpoints.begin(step) if is_main else None,
                    lambda: self._log.journal.flush() if is_main else None,  # a resumed run does not make them again
                    lambda: (staging / self._rank_file).write_text(json.dumps(rollouts.state_dict())),
                    lambda: learner.save(staging),
                    lambda: self._commit(step, staging) if is_main else None,
                )
        except PartFailed as error:
            self._failed(step, error, learner.checkpoint_bytes)
            return False
        self._step = step
        self._log.checkpoint_failures = 0
        return True

    def _failed(self, step: int, error: PartFailed, needs_bytes: int) -> None:
        if self._accelerator.is_main_process:
            self._checkpoints.discard(step)  # on a full disk, the metrics need the space
        self._log.checkpoint_failures += 1
        is_full = free_bytes(self._log.dir) < needs_bytes
        self.may_pass = any_rank(self._accelerator, error.may_pass or is_full)
        message = failure_message(step, error, self._log.dir, needs_bytes)
        self._log.journal.alert("checkpoint_failed", step, message, failures=self._log.checkpoint_failures)

    def evaluated(self) -> None:
        """The step's record has the results of an evaluation now."""
        if self._log.step == self._step:  # a resumed run has evaluated its checkpoint again
            self._best = self._best_with_this

    def _commit(self, step: int, staging: Path) -> None:
        best = self._best_with_this
        state = {
            "format": FORMAT, "step": step, "attempt": self._log.attempt, "facts": self._facts,
            "record": self._log.record, "best": best,
        }  # fmt: skip
        (staging / STATE_FILE).write_text(json.dumps(state))
        self._checkpoints.commit(step, best=best["step"] if best else None)
        self._best = best  # only now, because until the commit the previous best is the one on disk

    @property
    def _best_with_this(self) -> dict[str, Any] | None:
        """The best checkpoint, assuming that the current step gets one. Only the main process knows it."""
        record = self._log.record
        reward = record.get("eval", {}).get("reward_mean") if record else None
        best_reward = self._best["reward_mean"] if self._best else None
        if reward is None or (best_reward is not None and reward <= best_reward):
            return self._best
        return {"step": self._log.step, "reward_mean": reward}

    @property
    def _rank_file(self) -> str:
        return f"rollouts-{self._accelerator.process_index}.json"
