"""When a checkpoint is due, what it holds, and how a run resumes from it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.queue import Rollouts

from ..learner.learner import Learner
from ..ranks import PartFailed, any_rank, do_together
from ..volumes import free_bytes
from .checkpoint import FORMAT, STATE_FILE, Checkpoints, failure_message, read_state, readable, rollouts_file
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
        self._rewrites = 0
        """How often the newest checkpoint was rewritten. A rewrite that failed counts: it may have left files."""
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
        self._rewrites = self.saved["rewrites"]
        with readable(directory):
            learner.load(directory)
            rollouts.load_state_dict(
                json.loads((directory / self._files(self._rewrites)[self._accelerator.process_index]).read_text()),
                sample_again=self._changes.touch(SAMPLING),
                score_again=self._changes.touch(SCORING),
            )
        if self._best and self._changes.touch(EVALUATION):
            self._best = self._best | {"reward_mean": None}  # does not compare with the next evaluations
        self._report_changes(self._step)

    def _report_changes(self, step: int) -> None:
        attempt = self._log.attempt
        self._log.journal.note("resumed", step, f"resumed from step {step}, attempt {attempt}", attempt=attempt)
        if not self._changes:
            return
        self._log.journal.note(
            "settings_changed",
            step,
            f"changed since step {step}: {'; '.join(map(str, self._changes))}",
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
        """Write everything that `load` needs. Returns True if the step has a checkpoint now.

        If the step has one already, only its rollouts are replaced: groups may have finished since, or were dropped.
        A failure does not end the run. It raises an alert, and the next step tries again.
        """
        exists = step == self._step
        began_s = time.monotonic()
        try:
            with self._log.timer("checkpoint"):
                if exists:
                    self._rewrite(step, rollouts)
                else:
                    self._write(step, learner, rollouts)
        except PartFailed as error:
            self._failed(step, error, learner.checkpoint_bytes, exists=exists)
            return exists
        self._step = step
        self._log.checkpoint_failures = 0
        if not exists:
            self._log.journal.note(
                "checkpoint", step, f"a checkpoint was written in {time.monotonic() - began_s:.1f} s"
            )
        return True

    def _write(self, step: int, learner: Learner, rollouts: Rollouts) -> None:
        staging = self._checkpoints.staging(step)
        do_together(
            self._accelerator,
            self._on_main(lambda: self._checkpoints.begin(step)),
            self._on_main(self._log.journal.flush),  # a resumed run does not make these lines again
            lambda: self._write_rollouts(staging, rollouts, rewrites=0),
            lambda: learner.save(staging),
            self._on_main(lambda: self._commit(step, staging)),
        )
        self._rewrites = 0

    def _rewrite(self, step: int, rollouts: Rollouts) -> None:
        self._rewrites += 1
        directory, files = self._checkpoints.directory(step), self._files(self._rewrites)
        do_together(
            self._accelerator,
            self._on_main(self._log.journal.flush),
            lambda: self._write_rollouts(directory, rollouts, self._rewrites),
            self._on_main(lambda: self._checkpoints.rewrite(step, self._state(step, self._rewrites), files)),
        )

    def _on_main(self, part: Callable[[], object]) -> Callable[[], object]:
        """Return a part that does nothing on the other ranks."""
        return part if self._accelerator.is_main_process else lambda: None

    def _write_rollouts(self, directory: Path, rollouts: Rollouts, rewrites: int) -> None:
        file = directory / self._files(rewrites)[self._accelerator.process_index]
        file.write_text(json.dumps(rollouts.state_dict()))

    def _files(self, rewrites: int) -> list[str]:
        """The names of the files with the rollouts, by rank."""
        return [rollouts_file(rank, rewrites) for rank in range(self._accelerator.num_processes)]

    def _failed(self, step: int, error: PartFailed, needs_bytes: int, *, exists: bool) -> None:
        if self._accelerator.is_main_process:
            self._checkpoints.discard(step)  # on a full disk, the metrics need the space
            if exists:
                self._checkpoints.discard_rewrite(step, self._files)
        self._log.checkpoint_failures += 1
        is_full = free_bytes(self._log.dir) < needs_bytes
        self.may_pass = any_rank(self._accelerator, error.may_pass or is_full)
        message = failure_message(step, error, self._log.dir, needs_bytes, exists=exists)
        self._log.journal.alert("checkpoint_failed", step, message, failures=self._log.checkpoint_failures)

    def evaluated(self) -> None:
        """The step's record has the results of an evaluation now."""
        if self._log.step == self._step:  # a resumed run has evaluated its checkpoint again
            self._best = self._best_with_this

    def _commit(self, step: int, staging: Path) -> None:
        best = self._best_with_this
        (staging / STATE_FILE).write_text(self._state(step, rewrites=0))
        self._checkpoints.commit(step, best=best["step"] if best else None)
        self._best = best  # only now, because until the commit the previous best is the one on disk

    def _state(self, step: int, rewrites: int) -> str:
        state = {
            "format": FORMAT, "step": step, "attempt": self._log.attempt, "facts": self._facts,
            "record": self._log.record, "best": self._best_with_this, "rewrites": rewrites,
        }  # fmt: skip
        return json.dumps(state)

    @property
    def _best_with_this(self) -> dict[str, Any] | None:
        """The best checkpoint, assuming that the current step gets one. Only the main process knows it."""
        record = self._log.record
        reward = record.get("eval", {}).get("reward_mean") if record else None
        best_reward = self._best["reward_mean"] if self._best else None
        if reward is None or (best_reward is not None and reward <= best_reward):
            return self._best
        return {"step": self._log.step, "reward_mean": reward}
