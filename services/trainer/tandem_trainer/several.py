"""Several trainer processes of one node under `accelerate launch`, and the exit status that they come to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tandem_protocol import logs

STATUS_DIR = "TANDEM_TRAINER_STATUS_DIR"
"""Environment variable: folder where each process writes its exit status."""
USER_ERROR = 2


def launch(words: Sequence[str]) -> int:
    """Run accelerate's launcher in this process.

    By itself, the launcher ends with status 1 and a traceback when one of its processes fails. It also does not say
    which process failed first, because the others fail as soon as one has left.

    Returns:
        2 if any process ended with a user's mistake, else the exit status of the process that failed first, 128 + n if
        signal n killed it. After a stop signal: 0 if all processes had finished the run, else 128 + n.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        os.environ[STATUS_DIR] = folder
        try:
            launch_command(launch_command_parser().parse_args(words))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if USER_ERROR in written(Path(folder)):
                return USER_ERROR
            status = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
            logs.report_error(f"trainer process {rank} ended with exit status {status}, see above")
            return status
        except SignalException as signal:  # its processes have ended by then
            statuses = written(Path(folder))
            return max(statuses) if statuses and max(statuses) <= USER_ERROR else 128 + int(signal.sigval)
    return 0


def written(folder: Path) -> list[int]:
    """The exit statuses that processes have written."""
    return [int(file.read_text()) for file in folder.iterdir()]
