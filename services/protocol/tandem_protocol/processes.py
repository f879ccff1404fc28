"""Processes: their exit status, what those of one launcher share, and what one asks of the kernel."""

from __future__ import annotations

import ctypes
import signal

STATUS_DIR = "TANDEM_TRAINER_STATUS_DIR"
"""Environment variable with the folder that the trainer processes of one launcher share: their exit statuses, and what
one of them has already said."""
USER_ERROR = 2
"""Exit status after a user's mistake. The same command would fail again."""
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
