"""Hand a failure to the trainer, which reports it where the user looks and ends with its exit status.

Under Compose the preflight's log is hidden, and a generator that fails is started again. So both write their failure
to a file that the trainer reads.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import NamedTuple

PREFLIGHT_FILE = "TANDEM_PREFLIGHT_FILE"
"""Environment variable with the path of the file that a failed preflight leaves."""
_GENERATOR_FILE = "generator-failure."
"""Beginning of the names of the files that generators leave beside the end file."""


class Failure(NamedTuple):
    """How another container of the run has failed."""

    status: int
    """Exit status: 2 for a user's mistake."""
    message: str
    """What the user should read."""


def hand_over(file: Path, failure: Failure) -> None:
    """Write a failure. Readers see all of it or nothing.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(json.dumps(failure._asdict()))
    temporary.replace(file)


def handed_over(file: Path) -> Failure | None:
    """Return the failure in `file`; None if there is none."""
    try:
        return Failure(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None


def generator_file(end_file: Path) -> Path:
    """The file for the failure of the generator on this host."""
    return end_file.with_name(f"{_GENERATOR_FILE}{socket.gethostname()}")


def generator_failure(end_file: Path) -> Failure | None:
    """Return the failure of any generator; None if there is none."""
    files = sorted(end_file.parent.glob(f"{_GENERATOR_FILE}*"))
    return next((failure for file in files if (failure := handed_over(file))), None)
