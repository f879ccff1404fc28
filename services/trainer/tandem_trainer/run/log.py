"""What a run reports: the records of its steps, some completions, its events, its status and its timings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.version import Version
from tandem_rollout.dispatch import Loads
from tandem_rollout.errors import UserError
from tandem_rollout.pool import REFILL_BATCHES, Counts
from tandem_rollout.trajectory import Group

from ..learner.mismatch import MismatchCheck
from ..learner.trained_tokens import TrainedTokens
from .alerts import Alerts
from .clock import StepClock
from .journal import Journal
from .measures import Facts
from .metrics import TrajectorySample, failures, load_fields, samples, step_record, trajectory_records
from .step_line import StepLine
from .token_log import TokenLog, TokenTexts
from .trackers import scalars

MAX_CONSECUTIVE_SKIPS = 50
MAX_CONSECUTIVE_FAILURES = 3
"""Batches of which every episode failed. One may be an accident: an environment that is restarted."""
NO_COUNTS = Counts()
NO_LOADS = Loads({}, {})


def _sum(counts: Iterable[Counts]) -> Counts:
    """Add up the counts of all ranks."""
    return Counts(*map(sum, zip(*counts, strict=True)))


class RunLog:
    """The step that a run has reached, and the files that say so. Every rank has one; the main process writes."""

    def __init__(self, config: TrainerConfig, accelerator: Accelerator) -> None:
        self._config = config
        self._accelerator = accelerator
        self.mismatch_check: MismatchCheck | None = None
        """What compares trainer and generators. None until the generators are known."""
        self.alerts = Alerts(config.alerts, Facts(config.rollout.num_prompts, config.optim.max_grad_norm))
        self.dir = config.run_dir
        self.dir.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.dir, is_main=accelerator.is_main_process)
        self.step = 0
        """The last step that is complete and has a record."""
        self.version = Version(0, 0)
        self.attempt = 0
        self.record: dict[str, Any] | None = None
        """The record of `step`."""
        self.checkpoint_failures = 0
        """Checkpoints that failed since the last one that was written."""
        self.token_texts: TokenTexts | None = None
        """Set once the tokenizer is loaded. Until then, no tokens are logged."""
        self.loads: Callable[[], Loads] = lambda: NO_LOADS
        """Returns the load of the generators. Set once there is a client."""
        self._published: dict[str, Any] = {}
        """The timings and the size of the version that was published last."""
        self._clock = StepClock()
        self._step_line = StepLine(config.max_steps)
        self._consecutive_skips = 0
        self._consecutive_failures = 0
        self._groups_skipped = 0
        self._episodes_failed = 0
        """In batches that were skipped since the last step, on all ranks."""

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Measure the time of `phase` for the step's record, and show the phase in `status.json`.

        It is also a decorator: `timer("update")(learner.update)` measures every call.
        """
        self.journal.status(phase, self.version)
        with self._clock.phase(phase):
            yield

    def start_step(self) -> None:
        """Start measuring the first step. Loading the model and publishing the first version do not count."""
        self._clock.start_step()

    def published(self, timings: Mapping[str, float], size_bytes: int) -> None:
        """Put the timings of a version that is served into the next record that is written."""
        self._published = {"publish_timings": timings, "publish_bytes": size_bytes}

    def check_alerts(self) -> None:
        """Report the alerts that the step's record raises or ends, and put those that go on into the record."""
        if self.record is not None and self._config.alerts:
            self._check(self.record)
            self.record["alerts"] = dict(self.alerts.active)

    def _check(self, record: Mapping[str, Any]) -> None:
        if not self._accelerator.is_main_process:
            return
        if check := self.mismatch_check:
            self.alerts.facts = self.alerts.facts._replace(
                compares=check.is_on, mismatch=check.excess, mismatch_text=check.description
            )
        for change in self.alerts.check(record):
            self.journal.changed(record["step"], change)

    def skip(self, groups: Sequence[Group]) -> None:
        """Count groups without a learning signal, and write some of their completions.

        Raises:
            UserError: MAX_CONSECUTIVE_SKIPS batches in a row had no signal, or every episode of
                MAX_CONSECUTIVE_FAILURES batches failed.
        """
        self._groups_skipped += len(groups)
        self._consecutive_skips += 1
        upcoming = Version(self.step + 1, self.attempt)
        self._completions(upcoming, groups, skipped=True)
        self.journal.completions(())
        rows = self._samples(groups)
        self._episodes_failed += sum(row.reason is not None for row in rows)
        self._check(self._step_record(upcoming, rows, {}, groups_skipped=len(groups)) | {"skipped": True})
        self._report_failures(rows)
        self._report_refills(groups)
        if self._consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
            rewards = {reward for group in groups for reward in group.rewards}
            raise UserError(
                f"{MAX_CONSECUTIVE_SKIPS} times in a row no group had different rewards (last: {rewards}), so there is "
                f"nothing to learn from. {self.dir / 'rollouts.jsonl'} has some of the completions. Fix: make the "
                "reward finer, choose prompts that are neither too easy nor too hard, or raise rollout.num_generations."
            )

    def make_record(
        self,
        step: int,
        groups: Sequence[Group],
        stats: Mapping[str, float],
        counts: Counts = NO_COUNTS,
        trained: TrainedTokens | None = None,
    ) -> None:
        """Make the step's record. `checkpoint` saves it, and `log` writes it with the timings."""
        version = Version(step, self.attempt)
        rows = self._samples(groups)
        without_signal = sum(not group.has_signal for group in groups)
        totals = _sum(gather_object([counts]))
        skipped = sum(gather_object([self._groups_skipped + without_signal]))
        record = self._step_record(version, rows, stats, groups_skipped=skipped)
        if self._config.rollout.has_episodes:
            record["episodes_failed"] += self._episodes_failed
        record |= totals._asdict()
        record |= load_fields(gather_object([self.loads()]))
        record |= {"checkpoint_failures": 0} | self._published
        record |= {"alerts": dict(self.alerts.active)} if self._config.alerts else {}
        self.record = record | self._clock.figures(record["rollout_tokens"])
        self.step = step  # set last, because a step without a record would be missing after a resume
        self.version = version
        self._consecutive_skips = 0
        self._groups_skipped = self._episodes_failed = 0
        self._completions(version, groups, trained)
        self._report_failures(rows)
        self._report_refills(groups)

    def _completions(
        self, version: Version, groups: Sequence[Group], trained: TrainedTokens | None = None, *, skipped: bool = False
    ) -> None:
        """Keep some completions of this rank's groups for `rollouts.jsonl`. Only the main process makes lines."""
        if self._accelerator.is_main_process:
            tokens = TokenLog(self.token_texts, self._config.log_tokens, trained)
            count = self._config.log_completions
            self.journal.keep(trajectory_records(version, groups, count, skipped=skipped, tokens=tokens))

    def _step_record(
        self, version: Version, rows: Sequence[TrajectorySample], stats: Mapping[str, float], *, groups_skipped: int
    ) -> dict[str, Any]:
        return step_record(
            version,
            rows,
            stats,
            functions=self._config.scorers,
            groups_skipped=groups_skipped,
            has_episodes=self._config.rollout.has_episodes,
        )

    def _samples(self, groups: Sequence[Group]) -> list[TrajectorySample]:
        """The trajectories of all ranks. Every rank calls it at the same time."""
        rows: list[TrajectorySample] = gather_object(samples(groups, self.step))
        return rows

    def _report_failures(self, rows: Sequence[TrajectorySample]) -> None:
        """Report episodes that failed.

        Raises:
            UserError: every episode of MAX_CONSECUTIVE_FAILURES batches in a row failed.
        """
        message = failures(rows)
        self._consecutive_failures = self._consecutive_failures + 1 if all(row.reason for row in rows) else 0
        if message:
            self.journal.alert("episodes_failed", self.step, f"{message}. They are left out of the update.")
        if self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            raise UserError(
                f"all episodes of {MAX_CONSECUTIVE_FAILURES} batches in a row failed, so there is nothing to learn "
                f"from. Of the last batch, {message}. Fix: correct the environment or the agent."
            )

    def _report_refills(self, groups: Sequence[Group]) -> None:
        """Report a batch that could not be filled with groups that have a signal. Every rank calls it."""
        if not self._config.rollout.refill:
            return
        without_signal = sum(gather_object([sum(not group.has_signal for group in groups)]))
        if without_signal:
            limit = REFILL_BATCHES * self._config.rollout.num_prompts
            self.journal.alert(
                "refill_ended",
                self.step,
                f"{without_signal} groups of the step have equal rewards, because a step replaces at most {limit} such "
                "groups. Nothing is learned from them. Fix: make the reward finer, choose prompts that are neither too "
                "easy nor too hard, or raise rollout.num_generations.",
            )

    def log(self) -> None:
        """Write the step's record and some of its completions."""
        assert self.record is not None, "make_record comes first"
        self.record |= self._published | {"checkpoint_failures": self.checkpoint_failures}
        self.record |= self._clock.figures(self.record["rollout_tokens"])
        self._clock.start_step()  # before writing, which counts for the next step, so that no time is lost
        self.journal.step(self.record)
        self.journal.completions(())
        self.journal.progress(self._step_line(self.record))
        self._accelerator.log(dict(scalars(self.record)), step=self.step)
