"""One run's folder and life: resume, checkpoints, stopping, timing, and what it writes about itself."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

from .batch import ScoredGroup
from .checkpoint import Checkpoints
from .config import TrainerConfig
from .errors import UserError
from .learner import Learner
from .metrics import JsonLines, completion_records, samples, step_record
from .rollouts import Rollouts
from .trackers import scalars

log = logging.getLogger(__name__)

MAX_CONSECUTIVE_SKIPS = 50
STOP_POLL_S = 0.2
STOP_GRACE_S = 20.0
"""How long a run that was asked to stop still waits for generators, to finish its step: they may be gone already."""
STATE_FILE = "state.json"


ResultT = TypeVar("ResultT")


class Stopped(Exception):
    """The run was asked to stop while it waited."""


class Run:
    """Every rank has one and calls it at the same time; only the main process writes, except its own rollouts."""

    def __init__(self, config: TrainerConfig, accelerator: Accelerator, store: WeightStore) -> None:
        self._config, self._accelerator = config, accelerator
        self.dir = config.run_dir
        self.dir.mkdir(parents=True, exist_ok=True)
        self._checkpoints = Checkpoints(self.dir / "checkpoints", keep=config.checkpoint.keep)
        latest = self._checkpoints.latest()
        self._saved = _read_state(latest) if latest else None
        self._identity: dict[str, Any] = {}
        attempt = max(store.next_attempt(), self._saved["attempt"] + 1 if self._saved else 1)
        self.attempt = int(broadcast_object_list([attempt])[0])
        self._metrics, self._completions = JsonLines(self.dir / "metrics.jsonl"), JsonLines(self.dir / "rollouts.jsonl")
        self._timings: defaultdict[str, float] = defaultdict(float)
        self._step_started = time.monotonic()
        self._record: dict[str, Any] | None = None
        self._best: dict[str, Any] | None = self._saved.get("best") if self._saved else None
        self._consecutive_skips = self._groups_skipped = 0
        self._stop, self._wait_until = False, math.inf
        self._step, self._version = 0, Version(0, 0)
        self._checkpointed_step = -1

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
        flags = torch.tensor([flag], dtype=torch.int32, device=self._accelerator.device)
        return bool(self._accelerator.reduce(flags, reduction="sum").item())

    def gather(self, values: list[float]) -> list[float]:
        """Of all ranks, in their order."""
        return gather_object(values)  # type: ignore[no-any-return]  # untyped library

    def identify(self, identity: dict[str, Any], attempts: Iterable[int]) -> None:
        """Say what the run is of (a checkpoint of something else is refused) and which attempts generators serve.

        Raises:
            UserError: the run's folder holds a checkpoint of another model, data set, group size or number of ranks.
        """
        saved = self._saved["identity"] if self._saved else identity
        if differing := [name for name in identity if saved.get(name) != identity[name]]:
            raise UserError(
                "; ".join(f"{name} is {identity[name]!r}, in the checkpoint {saved.get(name)!r}" for name in differing)
                + f". {self.dir} holds a run of something else: choose another trainer.run_name, or delete it."
            )
        self._identity = identity
        self.attempt = int(broadcast_object_list([max([self.attempt, *(attempt + 1 for attempt in attempts)])])[0])

    def resume(self, learner: Learner, rollouts: Rollouts) -> int:
        """Load the newest checkpoint, if there is one; returns the step to go on from.

        With `max_lag` 0 and a generator that repeats itself under equal seeds, the run goes on as if it had never
        ended, bit for bit. With more lag, which version answers what is in flight depends on timing.
        """
        directory = self._checkpoints.latest()
        if directory and self._saved:
            self._step = self._checkpointed_step = self._saved["step"]
            self._record = self._saved["record"]
            learner.load(directory)
            rollouts.load_state_dict(json.loads((directory / self._rank_file).read_text()))
        if self._accelerator.is_main_process:
            for file in (self._metrics, self._completions):
                file.forget_after(self._step)
            if self._record and self._metrics.last_step() < self._step:
                self._metrics.append([self._record])
        self._version = Version(self._step, self.attempt)
        rollouts.start(self._version)
        return self._step

    @contextmanager
    def kept(self, learner: Learner, rollouts: Rollouts) -> Iterator[None]:
        """Write the last whole step to a checkpoint if the block fails; a stop request ends the block quietly.

        With several ranks a failure of one cannot be shared by all, and after some of a batch's optimizer steps the
        last whole step is gone, so nothing is written then.
        """
        try:
            yield
        except Stopped:
            return
        except Exception:
            if self._step and learner.is_whole and self._accelerator.num_processes == 1:
                try:
                    self.checkpoint(self._step, learner, rollouts)
                except OSError:
                    log.exception("step %s could not be saved before the run ends", self._step)
            raise

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
        """At every n-th step, the last, and where an evaluation was the best of the run."""
        if step % self._config.checkpoint.every_steps == 0 or step == self._config.max_steps:
            return True
        return self._config.checkpoint.keep_best and self.agree(self._best_step == step)

    def checkpoint(self, step: int, learner: Learner, rollouts: Rollouts) -> None:
        """Write everything that `resume` needs; does nothing when this step is on disk already."""
        if step == self._checkpointed_step:
            return
        is_main, staging = self._accelerator.is_main_process, self._checkpoints.staging(step)
        with self.timer("checkpoint"):
            if is_main:
                self._checkpoints.begin(step)
            self._accelerator.wait_for_everyone()
            (staging / self._rank_file).write_text(json.dumps(rollouts.state_dict()))
            learner.save(staging)
            if is_main:
                state = {
                    "step": step, "attempt": self.attempt, "identity": self._identity, "record": self._record,
                    "best": self._best,
                }  # fmt: skip
                (staging / STATE_FILE).write_text(json.dumps(state))
            self._accelerator.wait_for_everyone()
            if is_main:
                self._checkpoints.commit(step, best=self._best_step)
        self._checkpointed_step = step

    @property
    def _best_step(self) -> int | None:
        """Known to the main process."""
        return self._best["step"] if self._best else None

    @property
    def _rank_file(self) -> str:
        return f"rollouts-{self._accelerator.process_index}.json"

    # -- what it writes ------------------------------------------------------------------------------------------

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Count the time of `phase` for the step's record and show it in `status.json`."""
        started = time.monotonic()
        self._write_status(phase)
        yield
        self._timings[f"{phase}_s"] += time.monotonic() - started

    def _write_status(self, phase: str) -> None:
        """For whoever watches: what the trainer is doing and since when; replaced whole, so never half read."""
        if self._accelerator.is_main_process:
            status = {
                "phase": phase, "step": self._step, "version": str(self._version), "since_unix_s": time.time(),
            }  # fmt: skip
            temporary = self.dir / ".status.json"
            temporary.write_text(json.dumps(status))
            temporary.replace(self.dir / "status.json")

    def skip(self, groups: Sequence[ScoredGroup]) -> None:
        """Count groups that the learner cannot learn from.

        Raises:
            UserError: it goes on and on like that.
        """
        self._groups_skipped += len(groups)
        self._consecutive_skips += 1
        if self._consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
            rewards = {reward for group in groups for reward in group.rewards}
            raise UserError(
                f"{MAX_CONSECUTIVE_SKIPS} times in a row no group had different rewards (last: {rewards}), so there is "
                "nothing to learn from. Make the reward finer, the prompts neither too easy nor too hard, or raise "
                "rollout.num_generations."
            )

    def measure(self, step: int, groups: Sequence[ScoredGroup], stats: dict[str, float]) -> None:
        """Make the step's record, which `checkpoint` keeps and `log` writes with the timings."""
        version = Version(step, self.attempt)
        self._step, self._version = step, version
        self._groups_skipped += sum(not group.has_signal for group in groups)
        now = time.monotonic()
        self._record = step_record(
            version,
            gather_object(samples(groups, version.step - 1)),
            stats,
            functions=self._config.scorers,
            groups_skipped=sum(gather_object([self._groups_skipped])),
            step_s=now - self._step_started,
        ) | {"timings": {f"{phase}_s": 0.0 for phase in PHASES}}
        self._step_started = now
        self._consecutive_skips = self._groups_skipped = 0

    def evaluated(self, evaluation: dict[str, Any] | None) -> None:
        """Put an evaluation's figures into the step's record, and remember the best; None says nothing."""
        if evaluation is None or self._record is None:  # of another rank, or of the policy that training starts from
            return
        self._record["eval"] = evaluation
        reward = evaluation["reward_mean"]
        if reward is not None and (self._best is None or reward > self._best["reward_mean"]):
            self._best = {"step": self._step, "reward_mean": reward}

    def log(self, groups: Sequence[ScoredGroup]) -> None:
        """Write the step's record and some of its completions."""
        assert self._record is not None, "measure comes first"
        self._record["timings"] = {f"{phase}_s": self._timings[f"{phase}_s"] for phase in PHASES}
        self._timings.clear()
        if self._accelerator.is_main_process:
            self._metrics.append([self._record])
            self._completions.append(completion_records(self._version, groups, self._config.log_completions))
        self._accelerator.log(dict(scalars(self._record)), step=self._step)


PHASES = ("wait_for_rollouts", "update", "publish", "checkpoint")


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read: {error}. Delete it to go on from the one before."
        ) from error
    return state
