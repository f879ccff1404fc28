"""Deliver a signal to a trainer in a chosen phase of its step."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT_S = 90.0
POLL_S = 0.001


def status_of(run_dir: Path) -> dict[str, Any]:
    """Return a run's `status.json`, or an initial status if there is none yet."""
    file = run_dir / "status.json"
    return json.loads(file.read_text()) if file.exists() else {"phase": "start", "step": 0}


@contextmanager
def frozen_in(phase: str, run_dir: Path, process: int, *, after: int) -> Iterator[int]:
    """Freeze the trainer in a phase for the length of the `with` block, after step `after`. Gives the step.

    A phase may take milliseconds. The process is frozen first, and the phase is read again after that. If the process
    has left the phase, it continues to the next step.
    """

    def is_there() -> bool:
        status = status_of(run_dir)
        return status["phase"] == phase and status["step"] > after

    deadline = time.monotonic() + TIMEOUT_S
    while True:
        assert time.monotonic() < deadline, f"the trainer did not reach the phase {phase} within {TIMEOUT_S} s"
        if not is_there():
            time.sleep(POLL_S)
            continue
        os.kill(process, signal.SIGSTOP)
        try:
            _wait_until_frozen(process)
            if is_there():
                yield status_of(run_dir)["step"]
                return
        finally:
            os.kill(process, signal.SIGCONT)


def _wait_until_frozen(process: int) -> None:
    while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(POLL_S)


def child_of(process: int) -> int:
    """Return the only child of a process: in our images, PID 1 is tini."""
    (child,) = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(child)
