"""One run's folder and life: resume, checkpoints, stopping, timing, and what it writes about itself."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

from .batch import ScoredGroup
from .checkpoint import FORMAT, STATE_FILE, Checkpoints, read_state, readable
from .clock import StepClock
from .config import TrainerConfig
from .errors import MismatchTooHigh, UserError
from .journal import FAILED, STOPPED, Journal
from .learner import Learner
from .metrics import completion_records, samples, step_record
from .ranks import PartFailed, any_rank, do_together
from .resume import EVALUATION, SAMPLING, SCORING, Changes, compare
from .rollouts import Rollouts
from .trackers import scalars

MAX_CONSECUTIVE_SKIPS = 50
STOP_POLL_S = 0.2
STOP_GRACE_S = 20.0
"""How long a run that was asked to stop still waits for generators, to finish its step: they may be gone already."""

ResultT = TypeVar("ResultT")


class Stopped(Exception):
    """The run was asked to stop while it waited."""


class CheckpointFailed(Exception):
    """The last checkpoint of a run cannot be written."""


class Run:
    """One run's life. Every rank has one and calls it at the same time."""

    def __init__(self, config: TrainerConfig, accelerator: Accelerator, store: WeightStore) -> None:
        self._config, self._accelerator, self._store = config, accelerator, store
        self.dir = config.run_dir
        self.dir.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.dir, is_main=accelerator.is_main_process)
        self._checkpoints = Checkpoints(self.dir / "checkpoints", keep=config.checkpoint.keep)
        latest = self._checkpoints.latest()
        self._saved = read_state(latest) if latest else None
        self._facts: dict[str, Any] = {}
        self._changes = Changes()
        self.attempt = 0
        self._clock = StepClock()
        self._record: dict[str, Any] | None = None
        self._best: dict[str, Any] | None = self._saved.get("best") if self._saved else None
        self._consecutive_skips = self._groups_skipped = 0
        self._stop, self._wait_until, self._is_cut_short = False, math.inf, False
        self._step, self._version = 0, Version(0, 0)
        if self._saved:
            self._version = Version(self._saved["step"], self._saved["attempt"])  # until this attempt has its own
        self._checkpointed_step = -1
        self._failed_checkpoints = 0

    # -- life ----------------------------------------------------------------------------------------------------

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT end the run after the step under way; a second one ends the process at once."""

        def stop(number: int, _frame: object) -> None:
            self._stop, self._wait_until = True, time.monotonic() + STOP_GRACE_S
            signal.signal(number, signal.SIG_DFL)

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)

    def should_stop(self) -> bool:
        return self.agree(self._stop)

    def agree(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank."""
        return any_rank(self._accelerator, flag)

    def gather(self, values: list[float]) -> list[float]:
        """Of all ranks, in their order."""
        return gather_object(values)  # type: ignore[no-any-return]  # untyped library

    @property
    def finished(self) -> str | None:
        """What to say if the run has done all of its steps; None if there is something left to do."""
        saved = self._saved["step"] if self._saved else -1
        if self.journal.finished_step != saved or saved < self._config.max_steps:
            return None
        return (
            f"the run in {self.dir} is finished: step {saved} of trainer.max_steps {self._config.max_steps}. Nothing "
            "was trained, and changed settings had no effect. Raise trainer.max_steps to go on, or choose another "
            "trainer.run_name to start a new run."
        )

    @property
    def is_done(self) -> bool:
        """Whether all steps are made, and their last version is published and evaluated."""
        return self._step >= self._config.max_steps and not self._is_cut_short

    def identify(self, facts: dict[str, Any], attempts: Iterable[int]) -> None:
        """Compare the settings and `facts` with the checkpoint's, and choose this process's attempt.

        Args:
            facts: what `resume.describe` gives.
            attempts: those of the versions that generators serve.

        Raises:
            UserError: something changed that has to stay as it was.
        """
        self._facts = facts
        saved = self._saved or {"facts": facts, "attempt": 0}
        self._changes = compare(saved["facts"], facts, self.dir)
        attempt = max([self._store.next_attempt(), saved["attempt"] + 1, *(served + 1 for served in attempts)])
        self.attempt = int(broadcast_object_list([attempt])[0])

    def resume(self, learner: Learner, rollouts: Rollouts) -> int:
        """Load the newest checkpoint, if there is one, and say what changed since; returns the step to go on from.

        With `max_lag` 0 and a generator that repeats itself under equal seeds, the run goes on as if it had never
        ended, bit for bit. With more lag, which version answers what is in flight depends on timing.
        """
        directory = self._checkpoints.latest()
        if directory and self._saved:
            self._step = self._checkpointed_step = self._saved["step"]
            self._record = self._saved["record"]
            with readable(directory):
                learner.load(directory)
                rollouts.load_state_dict(
                    json.loads((directory / self._rank_file).read_text()),
                    sample_again=self._changes.touch(SAMPLING),
                    score_again=self._changes.touch(SCORING),
                )
            if self._best and self._changes.touch(EVALUATION):
                self._best = self._best | {"reward_mean": None}  # the next evaluation is the best that compares
            if self._changes:
                self.journal.note(
                    "settings_changed",
                    self._step,
                    f"resumed from step {self._step}; changed since: {'; '.join(map(str, self._changes))}",
                    changes={change.key: [change.before, change.now] for change in self._changes},
                )
        self.journal.rewind(self._step, self._record)
        self._version = Version(self._step, self.attempt)
        rollouts.start(self._version)
        return self._step

    @contextmanager
    def kept(self, learner: Learner, rollouts: Rollouts) -> Iterator[None]:
        """Write the last whole step to a checkpoint if the block fails; a stop request ends the block quietly.

        With several ranks a failure of one cannot be shared by all, and once the optimizer has changed the parameters
        the last whole step is gone, so nothing is written then.
        """
        try:
            yield
        except Stopped:
            self._is_cut_short = True  # the version of this step may have reached no generator
        except Exception as error:
            if isinstance(error, MismatchTooHigh):
                rollouts.forget_samples()  # they have wrong probabilities
            if self._step and learner.completed_updates == self._step and self._accelerator.num_processes == 1:
                self.checkpoint(self._step, learner, rollouts)
            raise
        finally:
            self.journal.complete(self._record)

    @contextmanager
    def life(self) -> Iterator[None]:
        """Say in `status.json` how the block ended."""
        try:
            yield
        except BaseException as error:
            self.journal.status(STOPPED if isinstance(error, KeyboardInterrupt) else FAILED, self._version)
            raise
        self.journal.end(self._version, finished=self.is_done)

    def wait(self, task: Future[ResultT]) -> ResultT:
        """The result of a background task, which ends by itself at its own deadline.

        Raises:
            Stopped: the run was asked to stop and the task did not end within STOP_GRACE_S; it is cancelled. Several
                ranks wait to the end, because they have to go on together.
        """
        while not task.done():
            if time.monotonic() > self._wait_until and self._accelerator.num_processes == 1:
                task.cancel()
                raise Stopped
            futures.wait([task], timeout=STOP_POLL_S)
        return task.result()

    def checkpoint_due(self, step: int) -> bool:
        """At every n-th step, the last, where an evaluation was the best of the run, and after one that failed."""
        if step % self._config.checkpoint.every_steps == 0 or step == self._config.max_steps:
            return True
        if self._failed_checkpoints:
            return True
        return self._config.checkpoint.keep_best and self.agree(self._best_with_this is not self._best)

    def checkpoint(self, step: int, learner: Learner, rollouts: Rollouts) -> bool:
        """Write everything that `resume` needs, unless this step is on disk already; returns whether it is there.

        A failure does not end the run. It is an alert, and the next step tries again.
        """
        if step == self._checkpointed_step:
            return True
        staging, is_main = self._checkpoints.staging(step), self._accelerator.is_main_process
        try:
            with self.timer("checkpoint"):
                do_together(
                    self._accelerator,
                    lambda: self._checkpoints.begin(step) if is_main else None,
                    lambda: (staging / self._rank_file).write_text(json.dumps(rollouts.state_dict())),
                    lambda: learner.save(staging),
                    lambda: self._commit(step, staging) if is_main else None,
                )
        except PartFailed as error:
            self._checkpoint_failed(step, error)
            return False
        self._checkpointed_step, self._failed_checkpoints = step, 0
        return True

    def _checkpoint_failed(self, step: int, error: PartFailed) -> None:
        if self._accelerator.is_main_process:
            self._checkpoints.discard(step)  # on a full disk, the metrics need its room
        self._failed_checkpoints += 1
        self.journal.alert(
            "checkpoint_failed",
            step,
            f"the checkpoint of step {step} cannot be written: {error}. The run goes on and tries again at the next "
            "step. Until then a crash loses the steps since the last checkpoint.",
            failures=self._failed_checkpoints,
        )

    def last_checkpoint(self, step: int, learner: Learner, rollouts: Rollouts) -> None:
        """Write the checkpoint that the run ends with.

        Raises:
            CheckpointFailed: it cannot be written.
        """
        if not self.checkpoint(step, learner, rollouts):
            raise CheckpointFailed(
                f"the last checkpoint, of step {step}, cannot be written (see above). Make {self.dir} writable, with "
                "enough space, and start the same command again: it goes on from the checkpoint before."
            )

    def _commit(self, step: int, staging: Path) -> None:
        best = self._best_with_this
        state = {
            "format": FORMAT, "step": step, "attempt": self.attempt, "facts": self._facts, "record": self._record,
            "best": best,
        }  # fmt: skip
        (staging / STATE_FILE).write_text(json.dumps(state))
        self._checkpoints.commit(step, best=best["step"] if best else None)
        self._best = best  # last: until then the one before is the best that is on disk

    @property
    def _best_with_this(self) -> dict[str, Any] | None:
        """The best checkpoint, if there is one of the last step. Known to the main process."""
        reward = self._record.get("eval", {}).get("reward_mean") if self._record else None
        best = self._best["reward_mean"] if self._best else None
        if reward is None or (best is not None and reward <= best):
            return self._best
        return {"step": self._step, "reward_mean": reward}

    @property
    def _rank_file(self) -> str:
        return f"rollouts-{self._accelerator.process_index}.json"

    # -- what it writes ------------------------------------------------------------------------------------------

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Count the time of `phase` for the step's record and show it in `status.json`."""
        self.journal.status(phase, self._version)
        with self._clock.phase(phase):
            yield

    def start_step(self) -> None:
        """Begin the first step's time here: loading, waiting for generators and the first version belong to none."""
        self._clock.start_step()

    def alert_mismatch(self, message: str) -> None:
        self.journal.alert("mismatch", self._step, message)

    def skip(self, groups: Sequence[ScoredGroup]) -> None:
        """Count groups that the learner cannot learn from, and write some of their completions.

        Raises:
            UserError: it goes on and on like that.
        """
        self._groups_skipped += len(groups)
        self._consecutive_skips += 1
        upcoming = Version(self._step + 1, self.attempt)
        self.journal.completions(completion_records(upcoming, groups, self._config.log_completions, skipped=True))
        if self._consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
            rewards = {reward for group in groups for reward in group.rewards}
            raise UserError(
                f"{MAX_CONSECUTIVE_SKIPS} times in a row no group had different rewards (last: {rewards}), so there is "
                f"nothing to learn from. {self.dir / 'rollouts.jsonl'} has some of the completions. Make the reward "
                "finer, the prompts neither too easy nor too hard, or raise rollout.num_generations."
            )

    def measure(self, step: int, groups: Sequence[ScoredGroup], stats: Mapping[str, float]) -> None:
        """Make the step's record, which `checkpoint` keeps and `log` writes with the timings."""
        version = Version(step, self.attempt)
        skipped = self._groups_skipped + sum(not group.has_signal for group in groups)
        record = step_record(
            version,
            gather_object(samples(groups, version.step - 1)),
            stats,
            functions=self._config.scorers,
            groups_skipped=sum(gather_object([skipped])),
        )
        self._record = record | {"checkpoint_failures": 0} | self._clock.figures(record["rollout_tokens"])
        self._step, self._version = step, version  # last: a step without a record would be missing after a resume
        self._consecutive_skips = self._groups_skipped = 0

    def evaluated(self, evaluation: dict[str, Any] | None) -> None:
        """Put an evaluation's figures into the step's record; None says nothing."""
        if evaluation is None or self._record is None:  # of another rank, or of the policy that training starts from
            return
        self._record["eval"] = evaluation
        if self._step == self._checkpointed_step:  # a resumed run has evaluated its checkpoint again
            self._best = self._best_with_this

    def log(self, groups: Sequence[ScoredGroup]) -> None:
        """Write the step's record and some of its completions."""
        assert self._record is not None, "measure comes first"
        self._record |= {"checkpoint_failures": self._failed_checkpoints}
        self._record |= self._clock.figures(self._record["rollout_tokens"])
        self._clock.start_step()  # what is written here takes time of the next step, so that no second is missing
        self.journal.step(self._record)
        self.journal.completions(completion_records(self._version, groups, self._config.log_completions))
        self._accelerator.log(dict(scalars(self._record)), step=self._step)
