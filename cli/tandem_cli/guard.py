"""Runs one command and kills all its processes when the command ends or when the process that started the guard ends.

    python -m tandem_cli.guard --cpus 0,1 --scratch DIR COMMAND…

Only the starter holds the writing end of the guard's standard input. When the pipe closes, the starter has died or
requests that the command is killed. SIGTERM is forwarded to the command but not to its children: vLLM's engine
processes must live until their server has drained.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_KILL_TIMEOUT_S = 10.0


def main() -> int:
    arguments = _parser().parse_args()
    os.sched_setaffinity(0, arguments.cpus)
    adopt_orphans()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGTERM, lambda *_: None)

    command = subprocess.Popen(arguments.command, stdin=subprocess.DEVNULL)
    starter_is_gone = _wait(command, woken)
    if starter_is_gone:
        command.kill()
    code = command.wait()
    end_descendants()
    if starter_is_gone and arguments.scratch:
        shutil.rmtree(arguments.scratch, ignore_errors=True)
    return code if code >= 0 else 128 - code


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent dies, in any session."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_descendants() -> None:
    """Send SIGKILL to all descendants until none is left. `adopt_orphans` must be called before they are started."""
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while (family := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=0.1)


def _wait(command: subprocess.Popen[bytes], woken: int) -> bool:
    """Wait until the command ends (False) or the starter's pipe closes (True). Forward SIGTERM meanwhile."""
    ended = os.pidfd_open(command.pid)
    while True:
        ready, _, _ = select.select([ended, woken, sys.stdin.fileno()], [], [])
        if ended in ready:
            return False
        if woken in ready:
            os.read(woken, 64)
            command.terminate()
        if sys.stdin.fileno() in ready:
            return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tandem_cli.guard", description="Run COMMAND and leave no process of it behind."
    )
    parser.add_argument(
        "--cpus", required=True, type=lambda text: {int(cpu) for cpu in text.split(",")}, help="CPUs to run on: 0,1"
    )
    parser.add_argument("--scratch", type=Path, help="directory to remove if the starter dies")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command with its arguments")
    return parser


if __name__ == "__main__":
    sys.exit(main())
