"""One run: its folder, resuming, checkpoints, stopping, timing, and the records that it writes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from .step_line import StepLine
from .stopping import ResultT, Stopped, StopRequest, exit_status
from .trackers import scalars

MAX_CONSECUTIVE_SKIPS = 50


class CheckpointFailed(Exception):
    """The last checkpoint of a run cannot be written."""


class Run:
    """One run. Every rank has a `Run` and calls its methods at the same time."""

    def __init__(self, config: TrainerConfig, accelerator: Accelerator, store: WeightStore) -> None:
        self._config = config
        self._accelerator = accelerator
        self._store = store
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
        self._step_line = StepLine(config.max_steps)
        self._record: dict[str, Any] | None = None
        self._best: dict[str, Any] | None = self._saved.get("best") if self._saved else None
        self._consecutive_skips = 0
        self._groups_skipped = 0
        self._stop = StopRequest()
        self._is_interrupted = False
        self._step = 0
        self._version = Version(0, 0)
        if self._saved:
            self._version = Version(self._saved["step"], self._saved["attempt"])  # until `resume` sets the new one
        self._checkpointed_step = -1
        self._failed_checkpoints = 0

    # -- life ----------------------------------------------------------------------------------------------------

    def stop_on_signals(self) -> None:
        """End the run after the current step on SIGTERM or SIGINT. A second signal ends the process at once."""
        self._stop.on_signals()

    @property
    def exit_status(self) -> int:
        """0 if the run is finished, else that of the signal that stopped it, on this or another rank."""
        return 0 if self.is_done else exit_status(self._stop.signal or signal.SIGTERM)

    def should_stop(self) -> bool:
        """True if any rank was asked to stop."""
        return self.agree(self._stop.is_made)

    def agree(self, flag: bool) -> bool:
        """True if `flag` is true on any rank."""
        return any_rank(self._accelerator, flag)

    def gather(self, values: list[float]) -> list[float]:
        """Concatenate the values of all ranks, in the order of the ranks."""
        return gather_object(values)  # type: ignore[no-any-return]  # untyped library

    @property
    def finished(self) -> str | None:
        """A message if the run has already done all of its steps, else None."""
        saved = self._saved["step"] if self._saved else -1
        if self.journal.finished_step != saved or saved < self._config.max_steps:
            return None
        return (
            f"the run in {self.dir} is finished: step {saved} of trainer.max_steps {self._config.max_steps}. Nothing "
            "was trained, and changed settings had no effect. Raise trainer.max_steps to continue, or choose another "
            "trainer.run_name to start a new run."
        )

    @property
    def is_done(self) -> bool:
        """True if all steps are done, and the last version is published and evaluated."""
        return self._step >= self._config.max_steps and not self._is_interrupted

    def identify(self, facts: dict[str, Any], attempts: Iterable[int]) -> None:
        """Compare `facts` with those of the checkpoint, and choose the attempt of this start.

        Args:
            facts: the settings and facts from `resume.describe`.
            attempts: attempts of the versions that the generators serve.

        Raises:
            UserError: something changed that must not change.
        """
        self._facts = facts
        saved = self._saved or {"facts": facts, "attempt": 0}
        self._changes = compare(saved["facts"], facts, self.dir)
        attempt = max([self._store.next_attempt(), saved["attempt"] + 1, *(served + 1 for served in attempts)])
        self.attempt = int(broadcast_object_list([attempt])[0])

    def resume(self, learner: Learner, rollouts: Rollouts) -> int:
        """Load the newest checkpoint, if there is one, and report what changed since. Returns its step.

        With `max_lag` 0 and a generator that is deterministic for a given seed, the result is bit for bit that of an
        uninterrupted run. With more lag, timing decides which version samples the rollouts in flight.
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
                self._best = self._best | {"reward_mean": None}  # does not compare with the next evaluations
            if self._changes:
                self.journal.note(
                    "settings_changed",
                    self._step,
                    f"resumed from step {self._step}; changed since: {'; '.join(map(str, self._changes))}",
                    changes={change.key: [change.before, change.now] for change in self._changes},
                )
            else:
                self.journal.progress(f"resumed from step {self._step}")
        self.journal.rewind(self._step, self._record)
        self._version = Version(self._step, self.attempt)
        rollouts.start(self._version)
        return self._step

    @contextmanager
    def checkpoint_on_failure(self, learner: Learner, rollouts: Rollouts) -> Iterator[None]:
        """Write a checkpoint of the last complete step if the block fails. A stop request ends it without an error.

        There is no checkpoint with several ranks, because one rank may fail alone. There is none after a part of an
        update either, because the parameters of the last complete step no longer exist.
        """
        try:
            yield
        except Stopped:
            self._is_interrupted = True  # the version of this step may not have reached any generator
        except Exception as error:
            if isinstance(error, MismatchTooHigh):
                rollouts.forget_samples()  # their probabilities are wrong
            if self._step and learner.completed_updates == self._step and self._accelerator.num_processes == 1:
                self.checkpoint(self._step, learner, rollouts)
            raise
        finally:
            self.journal.complete(self._record)

    @contextmanager
    def record_outcome(self) -> Iterator[None]:
        """Write to `status.json` how the block ended."""
        try:
            yield
        except BaseException as error:
            self.journal.status(STOPPED if isinstance(error, KeyboardInterrupt) else FAILED, self._version)
            raise
        self.journal.end(self._version, finished=self.is_done)

    def wait(self, task: Future[ResultT] | None) -> ResultT | None:
        """Wait for a background task, which has its own deadline, and return its result.

        Every rank calls it at the same time. One that has no task waits for the others.

        Raises:
            Stopped: the run was asked to stop, and a task of some rank was cancelled because it did not end soon.
        """
        result, is_cancelled = None, False
        try:
            result = self._stop.wait(task) if task else None
        except Stopped:
            is_cancelled = True
        if self.agree(is_cancelled):  # a rank that went on alone would wait for the others forever
            raise Stopped
        return result

    def checkpoint_due(self, step: int) -> bool:
        """True every `every_steps` steps, at the last step, after the best evaluation or after a failed checkpoint."""
        if step % self._config.checkpoint.every_steps == 0 or step == self._config.max_steps:
            return True
        if self._failed_checkpoints:
            return True
        return self._config.checkpoint.keep_best and self.agree(self._best_with_this is not self._best)

    def checkpoint(self, step: int, learner: Learner, rollouts: Rollouts) -> bool:
        """Write everything that `resume` needs, unless this step's checkpoint exists. Returns True if it exists now.

        A failure does not end the run. It raises an alert, and the next step tries again.
        """
        if step == self._checkpointed_step:
            return True
        staging = self._checkpoints.staging(step)
        is_main = self._accelerator.is_main_process
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
        self._checkpointed_step = step
        self._failed_checkpoints = 0
        return True

    def _checkpoint_failed(self, step: int, error: PartFailed) -> None:
        if self._accelerator.is_main_process:
            self._checkpoints.discard(step)  # on a full disk, the metrics need the space
        self._failed_checkpoints += 1
        self.journal.alert(
            "checkpoint_failed",
            step,
            f"the checkpoint of step {step} cannot be written: {error}. The run continues and tries again at the next "
            "step. Until then a crash loses the steps since the last checkpoint.",
            failures=self._failed_checkpoints,
        )

    def last_checkpoint(self, step: int, learner: Learner, rollouts: Rollouts) -> None:
        """Write the last checkpoint of the run.

        Raises:
            CheckpointFailed: it cannot be written.
        """
        if not self.checkpoint(step, learner, rollouts):
            raise CheckpointFailed(
                f"the last checkpoint, of step {step}, cannot be written (see above). Fix: make {self.dir} writable, "
                "with enough space, and run the same command again. It resumes from the previous checkpoint."
            )

    def _commit(self, step: int, staging: Path) -> None:
        best = self._best_with_this
        state = {
            "format": FORMAT, "step": step, "attempt": self.attempt, "facts": self._facts, "record": self._record,
            "best": best,
        }  # fmt: skip
        (staging / STATE_FILE).write_text(json.dumps(state))
        self._checkpoints.commit(step, best=best["step"] if best else None)
        self._best = best  # only now, because until the commit the previous best is the one on disk

    @property
    def _best_with_this(self) -> dict[str, Any] | None:
        """The best checkpoint, assuming that the current step gets one. Only the main process knows it."""
        reward = self._record.get("eval", {}).get("reward_mean") if self._record else None
        best_reward = self._best["reward_mean"] if self._best else None
        if reward is None or (best_reward is not None and reward <= best_reward):
            return self._best
        return {"step": self._step, "reward_mean": reward}

    @property
    def _rank_file(self) -> str:
        return f"rollouts-{self._accelerator.process_index}.json"

    # -- what it writes ------------------------------------------------------------------------------------------

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Measure the time of `phase` for the step's record, and show the phase in `status.json`."""
        self.journal.status(phase, self._version)
        with self._clock.phase(phase):
            yield

    def start_step(self) -> None:
        """Start measuring the first step. Loading the model and publishing the first version do not count."""
        self._clock.start_step()

    def alert_mismatch(self, message: str) -> None:
        self.journal.alert("mismatch", self._step, message)

    def skip(self, groups: Sequence[ScoredGroup]) -> None:
        """Count groups without a learning signal, and write some of their completions.

        Raises:
            UserError: MAX_CONSECUTIVE_SKIPS batches in a row had no signal.
        """
        self._groups_skipped += len(groups)
        self._consecutive_skips += 1
        upcoming = Version(self._step + 1, self.attempt)
        self.journal.completions(completion_records(upcoming, groups, self._config.log_completions, skipped=True))
        if self._consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
            rewards = {reward for group in groups for reward in group.rewards}
            raise UserError(
                f"{MAX_CONSECUTIVE_SKIPS} times in a row no group had different rewards (last: {rewards}), so there is "
                f"nothing to learn from. {self.dir / 'rollouts.jsonl'} has some of the completions. Fix: make the "
                "reward finer, choose prompts that are neither too easy nor too hard, or raise rollout.num_generations."
            )

    def make_record(self, step: int, groups: Sequence[ScoredGroup], stats: Mapping[str, float]) -> None:
        """Make the step's record. `checkpoint` saves it, and `log` writes it with the timings."""
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
        # Set last, because a step without a record would be missing from the metrics after a resume.
        self._step = step
        self._version = version
        self._consecutive_skips = 0
        self._groups_skipped = 0

    def evaluated(self, evaluation: dict[str, Any] | None) -> None:
        """Put the results of an evaluation into the step's record."""
        if evaluation is None or self._record is None:  # on another rank, or before the first step
            return
        self._record["eval"] = evaluation
        if self._step == self._checkpointed_step:  # a resumed run has evaluated its checkpoint again
            self._best = self._best_with_this

    def log(self, groups: Sequence[ScoredGroup]) -> None:
        """Write the step's record and some of its completions."""
        assert self._record is not None, "make_record comes first"
        self._record |= {"checkpoint_failures": self._failed_checkpoints}
        self._record |= self._clock.figures(self._record["rollout_tokens"])
        self._clock.start_step()  # before writing, which counts for the next step, so that no time is lost
        self.journal.step(self._record)
        self.journal.completions(completion_records(self._version, groups, self._config.log_completions))
        self.journal.progress(self._step_line(self._record))
        self._accelerator.log(dict(scalars(self._record)), step=self._step)
