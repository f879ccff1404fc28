"""One run: how it starts, resumes, waits, stops and ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.run_state import FAILED, STOPPED
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_rollout.queue import Rollouts

from ..learner.learner import Learner
from ..learner.mismatch import MismatchTooHigh
from ..ranks import FailedTogether, any_rank, any_ranks, together
from ..volumes import DISK_PAUSE_S, DISK_TIMEOUT_S
from .checkpoint import CheckpointFailed
from .checkpointing import Checkpointing
from .log import RunLog
from .stopping import ResultT, Stopped, StopRequest, exit_status

ON_ALL_RANKS = (FailedTogether, FloatingPointError, MismatchTooHigh)
"""Errors that every rank raises at the same place: agreed on, or found in figures that are the same on all ranks."""


class Run(RunLog):
    """One run, with its log and its checkpoints. Every rank has a `Run` and calls its methods at the same time."""

    def __init__(self, config: TrainerConfig, accelerator: Accelerator, store: WeightStore) -> None:
        super().__init__(config, accelerator)
        self._store = store
        self._checkpointing = Checkpointing(config, accelerator, self)
        self._saved = self._checkpointing.saved
        self._stop = StopRequest()
        self._is_interrupted = False
        if self._saved:
            self.version = Version(self._saved["step"], self._saved["attempt"])  # until `resume` sets the new one

    # -- start ---------------------------------------------------------------------------------------------------

    @property
    def resumes(self) -> bool:
        """True if there is a checkpoint."""
        return self._saved is not None

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

    def identify(self, facts: dict[str, Any], attempts: Iterable[int]) -> None:
        """Compare `facts` with those of the checkpoint, and choose the attempt of this start.

        Args:
            facts: the settings and facts from `resume.describe`.
            attempts: attempts of the versions that the generators serve.

        Raises:
            UserError: something changed that must not change.
        """
        self._checkpointing.compare(facts)
        saved_attempt = self._saved["attempt"] if self._saved else 0
        attempt = max([self._store.next_attempt(), saved_attempt + 1, *(served + 1 for served in attempts)])
        self.attempt = int(broadcast_object_list([attempt])[0])

    def resume(self, learner: Learner, rollouts: Rollouts) -> int:
        """Load the newest checkpoint, if there is one, and report what changed since. Returns its step.

        With `max_lag` 0 and a generator that is deterministic for a given seed, the result is bit for bit that of an
        uninterrupted run. With more lag, timing decides which version samples the rollouts in flight.
        """
        self._checkpointing.load(learner, rollouts)
        self.journal.rewind(self.step, self.record)
        self.alerts.resume(self.journal.records())
        self.version = Version(self.step, self.attempt)
        rollouts.start(self.version)
        return self.step

    # -- ranks ---------------------------------------------------------------------------------------------------

    def agree(self, flag: bool) -> bool:
        """True if `flag` is true on any rank."""
        return any_rank(self._accelerator, flag)

    def gather(self, values: list[float]) -> list[float]:
        """Concatenate the values of all ranks, in the order of the ranks."""
        return gather_object(values)  # type: ignore[no-any-return]  # untyped library

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def evaluated(self, evaluation: dict[str, Any] | None) -> None:
        """Put the results of an evaluation into the step's record."""
        if evaluation is None or self.record is None:  # on another rank, or before the first step
            return
        self.record["eval"] = evaluation
        self._checkpointing.evaluated()

    def checkpoint_due(self, step: int) -> bool:
        """True every `every_steps` steps, at the last step, after the best evaluation or after a failed checkpoint."""
        return self._checkpointing.due(step)

    def checkpoint(self, step: int, learner: Learner, rollouts: Rollouts) -> bool:
        """Write everything that `resume` needs. Returns False if it failed; then the next step tries again."""
        return self._checkpointing.write(step, learner, rollouts)

    def last_checkpoint(self, step: int, learner: Learner, rollouts: Rollouts) -> None:
        """Write the last checkpoint of the run. While the disk is full, wait and try again.

        Raises:
            CheckpointFailed: it cannot be written.
        """
        deadline = time.monotonic() + DISK_TIMEOUT_S
        while not self.checkpoint(step, learner, rollouts):
            gives_up = not self._checkpointing.may_pass or self._stop.is_made or time.monotonic() > deadline
            if self.agree(gives_up):
                raise CheckpointFailed(step, self.dir)
            time.sleep(DISK_PAUSE_S)

    @contextmanager
    def checkpoint_on_failure(self, learner: Learner, rollouts: Rollouts) -> Iterator[None]:
        """Write a checkpoint of the last complete step if the block fails. A stop request ends it without an error.

        There is none if one of several ranks fails alone, because they write it together. There is none after a part of
        an update either, because the parameters of the last complete step no longer exist.
        """
        try:
            yield
        except Stopped:
            self._is_interrupted = True  # the version of this step may not have reached any generator
        except Exception as error:
            if isinstance(error, MismatchTooHigh):
                rollouts.forget_samples()  # their probabilities are wrong
            can_save = self._accelerator.num_processes == 1 or isinstance(error, ON_ALL_RANKS)
            if can_save and self.step and learner.completed_updates == self.step:
                self.checkpoint(self.step, learner, rollouts)
            raise
        finally:
            self.journal.complete(self.record)

    # -- end -----------------------------------------------------------------------------------------------------

    def stop_on_signals(self) -> None:
        """End the run after the current step on SIGTERM or SIGINT. A second signal ends the process at once."""
        self._stop.on_signals()

    def should_stop(self) -> bool:
        """True if any rank was asked to stop."""
        return self.agree(self._stop.is_made)

    def wait(self, task: Future[ResultT] | None, *, behind: Future[None] | None = None) -> ResultT | None:
        """Wait for a background task, which has its own deadline, and return its result.

        Every rank calls it at the same time. One that has no task waits for the others. The ranks look at their tasks
        together, again and again. A rank that waited alone would keep the others in a collective operation, which NCCL
        ends after 10 minutes, and would not notice that another rank has failed.

        Args:
            behind: another task, whose error ends the wait.

        Raises:
            Stopped: the run was asked to stop, and the task of some rank did not end soon.
            FailedTogether: with several ranks, if the task of one failed. A single rank raises the task's error.
        """

        def look() -> tuple[bool, bool]:
            try:
                return task is not None and not self._stop.look(task, behind), False
            except Stopped:
                return False, True

        is_waiting, is_stopped = True, False
        try:
            while is_waiting and not is_stopped:
                is_waiting, is_stopped = any_ranks(self._accelerator, *together(self._accelerator, look))
            if is_stopped:
                raise Stopped
        except BaseException:
            if task is not None:
                task.cancel()
            raise
        return task.result() if task else None

    @property
    def is_done(self) -> bool:
        """True if all steps are done, and the last version is published and evaluated."""
        return self.step >= self._config.max_steps and not self._is_interrupted

    @property
    def exit_status(self) -> int:
        """0 if the run is finished, else that of the signal that stopped it, on this or another rank."""
        return 0 if self.is_done else exit_status(self._stop.signal or signal.SIGTERM)

    @contextmanager
    def record_outcome(self) -> Iterator[None]:
        """Write to `status.json` how the block ended."""
        try:
            yield
        except BaseException as error:
            self.journal.save()
            if isinstance(error, Exception):
                self.journal.failed(self.step, error)
            self.journal.status(STOPPED if isinstance(error, KeyboardInterrupt) else FAILED, self.version)
            raise
        self.journal.end(self.version, finished=self.is_done)
