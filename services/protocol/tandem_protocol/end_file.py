"""A service that ends with its run (compose.yaml): the trainer writes a file when the run is over.

A generator's mistake also ends the run. The generator hands it to the trainer, and waits for that file.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from .handover import PREFLIGHT_FILE, Failure, generator_file, hand_over, handed_over

log = logging.getLogger(__name__)

VARIABLE = "TANDEM_END_FILE"
"""Environment variable with the path of the file."""
POLL_S = 1.0
TRAINER_TIMEOUT_S = 120.0
"""How long to wait for the trainer to end the run, in seconds. It may have to finish a step and write a checkpoint."""


FAILED_STARTS = 3
"""How often in a row a generator may fail before it has ever served. Then another start would not help either."""


class EndFile:
    """The file that the trainer writes when the run is over."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._failure = generator_file(file)
        self._fails = threading.Event()

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> EndFile | None:
        """The file that the environment names; None if this service does not end with its run."""
        return cls(Path(env[VARIABLE])) if env.get(VARIABLE) else None

    def should_start(self, env: Mapping[str, str] = os.environ) -> bool:
        """Whether there is a run to serve. If the preflight has failed, wait until the trainer has said so."""
        self._failure.unlink(missing_ok=True)  # this start may succeed
        preflight = env.get(PREFLIGHT_FILE)
        if preflight and handed_over(Path(preflight)):
            log.info("the preflight failed, so this service does not start; the trainer's log says why")
            self._wait()
            return False
        return not self.is_over()

    def is_over(self) -> bool:
        """Whether the run is over."""
        if is_over := self._file.exists():
            log.info("the run is over (%s), so this service does not start", self._file)
        return is_over

    def end_with_run(self) -> None:
        """Send this process SIGTERM as soon as the run is over, from a thread in the background."""

        def watch() -> None:
            while not self._file.exists():
                if self._fails.wait(POLL_S):
                    return  # `end_run` waits for the file
            log.info("the run is over, so this service ends")
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()

    def end_run(self, failure: Failure) -> bool:
        """Have the trainer end the run with this failure, and wait until it has.

        Returns:
            False if the trainer did not do so in time.
        """
        self._fails.set()
        hand_over(self._failure, failure)
        log.info("waiting until the trainer has ended the run with this error")
        return self._wait()

    def starts_fail(self, lease: Path) -> bool:
        """Count a failure that a restart may fix. Returns True if it is one too many.

        Args:
            lease: this generator's lease. If it is there, the generator has served in this run, so nothing is counted.
        """
        if lease.exists():
            return False
        starts = self._failure.with_name(f"failed-starts.{self._failure.name}")
        count = int(starts.read_text()) + 1 if starts.exists() else 1
        starts.write_text(str(count))
        return count >= FAILED_STARTS

    def _wait(self) -> bool:
        deadline = time.monotonic() + TRAINER_TIMEOUT_S
        while not self._file.exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True
