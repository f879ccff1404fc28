"""Child processes: their CPUs, environment, log file and end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

_KILL_TIMEOUT_S = 15.0


class ServiceProcess:
    """A running command with its log. `kill`, or the end of this process, ends it and all processes that it started."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        folder: Path,
        env: Mapping[str, str],
        cpus: Sequence[int],
        log: Path,
        scratch: Path | None = None,
    ) -> None:
        """Start `command`.

        Args:
            folder: the working directory.
            scratch: a directory that the guard removes if this process dies.
        """
        self.name = name
        self.log = log
        self.cpus = cpus
        guard = [sys.executable, "-m", "tandem_cli.guard", "--cpus", ",".join(map(str, cpus))]
        guard += ["--scratch", str(scratch)] if scratch else []
        with log.open("ab") as output:
            self._guard = subprocess.Popen(
                [*guard, *command],
                cwd=folder,
                env={**env, "OMP_NUM_THREADS": str(len(cpus)), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C must reach only this process, not its children
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs. 128 + n if signal n ended it."""
        code = self._guard.poll()
        return 128 - code if code is not None and code < 0 else code

    def terminate(self) -> None:
        """Send SIGTERM: finish and end."""
        self._guard.terminate()

    def kill(self) -> None:
        """Kill it with all its processes and wait until they are gone. Does nothing if it has ended."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()

    def last_lines(self, count: int = 20) -> list[str]:
        """Return the last lines of its log."""
        with self.log.open(errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, maxlen=count)]


class ServiceFailed(Exception):
    """A service ended with an error, or did not do what it was started for.

    Args:
        problem: what is wrong, such as `was not ready within 900 s`. None: the exit code is described.
    """

    def __init__(self, service: ServiceProcess, problem: str | None = None) -> None:
        super().__init__(f"the {service.name} {problem or describe_exit(service.exit_code)}")
        self.service = service
        self.exit_code = service.exit_code


def describe_exit(exit_code: int | None) -> str:
    """Describe an exit code: `ended with exit code 2`, `was killed by SIGKILL (exit code 137)`."""
    assert exit_code is not None
    try:
        return f"was killed by {signal.Signals(exit_code - 128).name} (exit code {exit_code})"
    except ValueError:
        return f"ended with exit code {exit_code}"


def choose_cpus(cpus: Sequence[int], *, take_turns: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the CPUs of the generator and those of the trainer.

    Args:
        take_turns: One of the two waits while the other works, as with `max_lag: 0`. Then both use all CPUs. If they
            work at the same time, each has CPUs of its own: threads that wait for each other's cores would be slower.
    """
    return (tuple(cpus), tuple(cpus)) if take_turns else split_cpus(cpus)


def split_cpus(cpus: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide CPUs into disjoint halves for generator and trainer, the larger one first. A single CPU is shared.

    Hardware threads of one core stay together, so that the services do not compete for a core.
    """
    ordered = sorted(cpus, key=lambda cpu: (_first_sibling(cpu), cpu))
    middle = (len(ordered) + 1) // 2
    return tuple(ordered[:middle]), tuple(ordered[middle:] or ordered)


def _first_sibling(cpu: int) -> int:
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        return int(text.replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return cpu
