"""Say once per machine what all of its trainer processes find out: they read the same files and settings."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from .processes import STATUS_DIR


def first_to_say(message: str) -> bool:
    """True if no process that this machine's launcher has started has said `message` before."""
    folder = os.environ.get(STATUS_DIR)
    if not folder:
        return True
    try:
        Path(folder, hashlib.sha256(message.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # rather twice than never
        return True
    return True


def warn_once(log: logging.Logger, message: str) -> None:
    """Log a warning, on debug level if another process of this machine has said it."""
    log.log(logging.WARNING if first_to_say(message) else logging.DEBUG, "%s", message)
