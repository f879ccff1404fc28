"""Stop a run on SIGTERM or SIGINT: it finishes the current step, unless that waits too long for generators."""

from __future__ import annotations

import math
import signal
import time
from concurrent import futures
from concurrent.futures import Future
from typing import TypeVar


def exit_status(number: int) -> int:
    """The exit status after a signal, as shells have it: 143 after SIGTERM, 130 after SIGINT."""
    return 128 + number


STOPPED = (exit_status(signal.SIGTERM), exit_status(signal.SIGINT))
"""Exit statuses of a run that was stopped. It has a checkpoint, and the same command resumes it."""
STOP_POLL_S = 0.2
STOP_GRACE_S = 20.0
"""How long a run that was asked to stop waits for generators to finish its step. They may have stopped already."""

ResultT = TypeVar("ResultT")


class Stopped(Exception):
    """The run was asked to stop while it waited."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived before the first step. Like KeyboardInterrupt, which it is for SIGINT, it ends the process."""


def raise_terminated(*_: object) -> None:
    """Signal handler for SIGTERM before the first step."""
    raise Terminated


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The signal that asked."""
        self._deadline = math.inf

    def on_signals(self) -> None:
        """Make the request on SIGTERM or SIGINT. A second signal ends the process at once."""

        def stop(number: int, _frame: object) -> None:
            self.signal = number
            self._deadline = time.monotonic() + STOP_GRACE_S
            signal.signal(number, signal.SIG_DFL)

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)

    @property
    def is_made(self) -> bool:
        return self.signal is not None

    def wait(self, task: Future[ResultT], behind: Future[None] | None = None) -> ResultT:
        """Wait for a background task, which has its own deadline, and return its result.

        Args:
            behind: another task, without which this one may never end. If it fails, this one is cancelled, and the
                error is raised.

        Raises:
            Stopped: the task was cancelled, because it did not end within STOP_GRACE_S of the stop request.
        """
        while True:
            if behind and behind.done() and (error := behind.exception()):
                task.cancel()
                raise error
            if task.done():
                return task.result()
            if time.monotonic() > self._deadline:
                task.cancel()
                raise Stopped
            futures.wait([task], timeout=STOP_POLL_S)
