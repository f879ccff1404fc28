"""Several trainer processes under `accelerate launch`, and the exit status that they come to."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

from tandem_protocol import logs
from tandem_protocol.problems import one_line
from tandem_protocol.processes import STATUS_DIR, USER_ERROR

from .nodes import met
from .rendezvous import BoundRendezvous
from .run.stopping import STOPPED, Terminated, exit_status, raise_terminated

RENDEZVOUS = "timeout=60"
"""torch's rendezvous is short, because the nodes have already met."""


def launch(words: Sequence[str]) -> int:
    """Run accelerate's launcher in this process, after the launchers of all nodes have met.

    Returns:
        The exit status of `run`. If another node has ended, its status.
    """
    # Otherwise the launcher sets it, with a warning. The trainer sets the number of torch's threads itself.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The launcher finds its rendezvous by the name `static`, for which torch allows no second class.
    static_tcp_rendezvous.StaticTCPRendezvous = BoundRendezvous  # type: ignore[misc]
    logs.adopt("torch")
    quiet()
    args = launch_command_parser().parse_args(words)
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        os.environ[STATUS_DIR] = folder

        def give_up(status: int) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(status)  # the kernel kills the trainer processes, which may wait for the other node forever

        if args.num_machines == 1:
            return run(args, Path(folder))
        signal.signal(signal.SIGTERM, raise_terminated)  # torch's own handler takes its place
        with ExitStack() as stack:
            place = args.machine_rank, args.num_machines, args.main_process_ip, args.main_process_port
            try:
                meeting = stack.enter_context(met(*place, give_up))
            except (OSError, ValueError) as error:
                logs.report_error(error)
                return 1 if isinstance(error, OSError) else USER_ERROR
            except KeyboardInterrupt as stopped:
                return interrupted(stopped)
            args.main_process_port, args.rdzv_conf = meeting.port, RENDEZVOUS
            meeting.status = run(args, Path(folder))
            return meeting.status


def quiet() -> None:
    """Drop what torch's launcher logs, such as a traceback when a process or another node has ended. `run` reports it.

    Levels would not help: a module of the launcher sets that of its own logger when it is imported, which may be later.
    """
    launcher = logging.getLogger("torch.distributed.elastic")
    launcher.handlers, launcher.propagate = [logging.NullHandler()], False


def interrupted(error: KeyboardInterrupt) -> int:
    """The exit status if a signal arrived before the trainer processes ran."""
    return exit_status(signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def run(args: Namespace, folder: Path) -> int:
    """Run the trainer processes of this node.

    By itself, the launcher ends with status 1 and a traceback when one of its processes fails. It also does not say
    which process failed first, because the others fail as soon as one has left.

    Returns:
        2 if any process ended with a user's mistake, else the exit status of the process that failed first, 128 + n if
        signal n killed it. After a stop signal: 0 if all processes had finished the run, else 128 + n.
    """
    try:
        launch_command(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if USER_ERROR in written(folder):
            return USER_ERROR
        if failure.exitcode < 0:
            number = signal.Signals(-failure.exitcode)
            logs.report_error(f"trainer process {rank} was killed by signal {number} ({number.name})")
            return exit_status(number)
        if failure.exitcode not in STOPPED:
            logs.report_error(f"trainer process {rank} ended with exit status {failure.exitcode}, see above")
        return failure.exitcode
    except DistError as error:
        logs.report_error(f"the trainer processes lost each other: {one_line(error)}")
        return 1
    except SignalException as stopped:  # its processes have ended by then
        statuses = written(folder)
        is_over = bool(statuses) and max(statuses) <= USER_ERROR
        return max(statuses) if is_over else exit_status(stopped.sigval)
    except KeyboardInterrupt as stopped:
        return interrupted(stopped)
    return 0


def written(folder: Path) -> list[int]:
    """The exit statuses that processes have written. One that is incomplete, on a full disk, is left out."""
    texts = (file.read_text() for file in folder.iterdir())
    return [int(text) for text in texts if text.isdecimal()]
