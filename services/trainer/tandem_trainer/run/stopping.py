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

    def wait(self, task: Future[ResultT]) -> ResultT:
        """Wait for a background task, which has its own deadline, and return its result. Cancel it on a stop request.

        Raises:
            Stopped: the task did not end within STOP_GRACE_S of the stop request.
        """
        try:
            while not self.look(task):
                pass
        except Stopped:
            task.cancel()
            raise
        return task.result()

    def look(self, task: Future[ResultT], behind: Future[None] | None = None) -> bool:
        """Return whether a background task, which has its own deadline, has ended: at once, or after STOP_POLL_S.

        Args:
            behind: another task, without which this one may never end. If it fails, its error is raised.

        Raises:
            Stopped: the task has not ended within STOP_GRACE_S of the stop request.
            Exception: the error of the task.
        """
        if behind and behind.done() and (error := behind.exception()):
            raise error
        if not task.done() and time.monotonic() > self._deadline:
            raise Stopped
        futures.wait([task], timeout=STOP_POLL_S)
        if not task.done():
            return False
        task.result()
        return True
