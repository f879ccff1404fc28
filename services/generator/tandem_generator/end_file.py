"""End this generator when a file appears: the trainer writes it when the run is over (compose.yaml)."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

log = logging.getLogger(__name__)

VARIABLE = "TANDEM_END_FILE"
"""Environment variable with the path of the file."""
POLL_S = 1.0


def run_is_over(file: Path) -> bool:
    """Whether the file is there."""
    return file.exists()


def end_with(file: Path) -> None:
    """Send this process SIGTERM as soon as `file` is there, from a thread in the background."""

    def watch() -> None:
        while not run_is_over(file):
            time.sleep(POLL_S)
        log.info("the run is over, so this generator ends")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
