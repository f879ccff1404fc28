"""Start the trainer again after failures that a retry may fix, and end with its last exit status.

A failure counts against the retries until the run has a new checkpoint. So a run that fails once an hour goes on for
days, and one that fails at its start ends after a few minutes.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tandem_protocol.handover import Failure
from tandem_protocol.logs import fields, report_error
from tandem_protocol.memory import oom_kills, why_killed
from tandem_protocol.processes import USER_ERROR

from .run.stopping import STOPPED, exit_status

log = logging.getLogger(__name__)

FINISHED = 0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
POLL_S = 1.0
"""How often to look for a failure of the generators."""
STOP_TIMEOUT_S = 280.0
"""How long the trainer may take to write a checkpoint when a generator has failed for good."""


class Supervisor:
    """Runs one command until it is finished for good."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        retries: int,
        newest_checkpoint: Callable[[], int],
        generator_failure: Callable[[], Failure | None] = lambda: None,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        """
        Args:
            retries: how often the command may be started again before the run has a new checkpoint.
            newest_checkpoint: the step of the newest checkpoint; -1 without any.
            generator_failure: the failure of a generator that a retry would not change. It ends the run.
        """
        self._command, self._env, self._retries = list(command), dict(env), retries
        self._newest_checkpoint = newest_checkpoint
        self._generator_failure = generator_failure
        self._failure: Failure | None = None
        self._first_pause_s = first_pause_s
        self._child: subprocess.Popen[bytes] | None = None
        self._stop_signal: int | None = None
        self._stopping = threading.Event()

    def run(self) -> int:
        """Run the command, again after failures. SIGTERM and SIGINT are passed on, and end it.

        Returns:
            The exit status of the last try: 0 finished, 2 a user's mistake, 128 + n after signal n. If a generator
            failed for good, its exit status.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        failures, step = 0, self._newest_checkpoint()
        while True:
            status = self._try()
            if status != FINISHED and (failure := self._failed_generator()):
                return failure.status
            if status in (FINISHED, USER_ERROR, *STOPPED) or self._stopping.is_set():
                return status
            if (newest := self._newest_checkpoint()) != step:
                failures, step = 0, newest
            failures += 1
            if failures > self._retries:
                log.error("the trainer ended with exit status %d, and %s", status, self._no_more(step))
                return status
            pause_s = min(self._first_pause_s * 2 ** (failures - 1), LONGEST_PAUSE_S)
            log.warning(
                "the trainer ended with exit status %d; starting it again in %.0f s (retry %d of %d before the next "
                "checkpoint)",
                status,
                pause_s,
                failures,
                self._retries,
                extra=fields(status=status, retry=failures),
            )
            if self._stopping.wait(pause_s):
                assert self._stop_signal is not None, "set by the handler"
                return exit_status(self._stop_signal)

    def _no_more(self, step: int) -> str:
        since = f"since the checkpoint of step {step}" if step >= 0 else "before the first checkpoint"
        return f"{self._retries} retries {since} did not help. Fix what the messages above name, and start it again."

    def _try(self) -> int:
        killed = oom_kills()
        # In its own session, so that Ctrl-C in a terminal reaches it once, through `_stop`: a second signal kills.
        self._child = subprocess.Popen(self._command, env=self._env, start_new_session=True)  # noqa: S603 - our module
        if self._stopping.is_set():  # the signal came before there was a process to pass it to
            self._child.terminate()
        status = self._wait(self._child)
        if status != FINISHED and oom_kills() > killed:
            report_error(why_killed("TANDEM_TRAINER_MEMORY", "lower trainer.learner.max_tokens_per_micro_batch"))
        return status if status >= 0 else exit_status(-status)

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        """Wait for the end of `child`. Stop it if a generator fails for good."""
        stopped_s: float | None = None
        while True:
            try:
                return child.wait(POLL_S)
            except subprocess.TimeoutExpired:
                pass
            if stopped_s is None and self._failed_generator():
                child.terminate()
                stopped_s = time.monotonic()
            if stopped_s is not None and time.monotonic() - stopped_s > STOP_TIMEOUT_S:
                child.kill()

    def _failed_generator(self) -> Failure | None:
        """Return the failure of a generator, if there is one. Report it once."""
        if self._failure is None and (failure := self._generator_failure()):
            report_error(f"a generator cannot serve this run: {failure.message}")
            self._failure = failure
        return self._failure

    def _stop(self, number: int, _frame: object) -> None:
        self._stop_signal = number
        self._stopping.set()
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def newest_checkpoint(run_dir: Path) -> int:
    """The step of the newest checkpoint in a run's folder; -1 without any."""
    names = (path.name for path in (run_dir / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdecimal()), default=-1)
