"""Run a command of the preflight: show its output as it comes, and keep the last lines for an error message."""

from __future__ import annotations

import logging
import os
import subprocess
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from tandem_protocol.printed import show

log = logging.getLogger("tandem_preflight")

KEPT_LINES = 15


class CommandFailed(Exception):
    """A command ended with another status than 0."""

    def __init__(self, what: str, status: int, lines: Sequence[str]) -> None:
        """
        Args:
            lines: the last ones of its output.
        """
        output = "".join(f"\n    {line}" for line in lines)
        super().__init__(f"{what} ended with exit status {status}." + (f" Its last lines:{output}" if lines else ""))
        self.status = status
        self.lines = lines


def run_shown(what: str, command: Sequence[str], folder: Path, **env: str) -> None:
    """Run `command` in `folder`.

    Args:
        what: name of the command, for the message.
        env: further environment variables.

    Raises:
        CommandFailed: its status is not 0; 128 + n after signal n.
        OSError: it cannot be started.
    """
    kept: deque[str] = deque(maxlen=KEPT_LINES)
    with subprocess.Popen(  # noqa: S603 - our commands, and the project's own
        command, cwd=folder, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            show(log, line)
            kept.append(line.rstrip())
    if status := process.returncode:
        raise CommandFailed(what, status if status > 0 else 128 - status, [*kept])
