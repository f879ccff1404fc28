"""Processes: their exit status, what those of one launcher share, and what one asks of the kernel."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

STATUS_DIR = "TANDEM_TRAINER_STATUS_DIR"
"""Environment variable with the folder that the trainer processes of one launcher share: their exit statuses, and what
one of them has already said."""
USER_ERROR = 2
"""Exit status after a user's mistake. The same command would fail again."""
_PR_SET_PDEATHSIG = 1


def reporting(run: Callable[[], int]) -> int:
    """Return the exit status of `run`. Under a launcher, also leave it for the launcher, and die with it."""
    folder = os.environ.get(STATUS_DIR)
    if folder:
        die_with_parent()  # otherwise it would hold the run's lock after the launcher was killed
    status = run()
    if folder:
        with suppress(OSError):
            Path(folder, str(os.getpid())).write_text(str(status))
    return status


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
