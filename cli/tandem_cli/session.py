"""A run on this machine: follows its generator and trainer on one screen, and ends both."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.text import Text

from .processes import ServiceFailed, ServiceProcess
from .progress import GeneratorProbe, Progress
from .run_folder import RunFolder
from .screen import LiveScreen, PlainScreen, RunHeader, Screen, shown
from .stop import SignalCounter
from .summary import show_summary

POLL_S = 0.2
_FINISH_STEP_TIMEOUT_S = 120.0
"""Time that the trainer has, after Ctrl-C, to finish its step and write a checkpoint."""
_GENERATOR_GRACE_S = 5.0
"""Time that the generator has to end, on top of its own shutdown timeout."""

_TERMINATED = 128 + signal.SIGTERM
"""Exit code of a trainer that was stopped, or that got SIGTERM before it had installed its handler."""

_RUNNING = "Ctrl-C finishes the step, writes a checkpoint and ends"
_FINISHING = "finishing the step and writing a checkpoint; press Ctrl-C again to kill"
_ENDING = "stopping the generator"


class Services(Protocol):
    """A trainer and its generator."""

    trainer: ServiceProcess
    url: str
    token: str

    @property
    def generator(self) -> ServiceProcess | None:
        """None until it is started."""

    def poll(self) -> None:
        """Start the generator when it is known what it must be."""


@dataclass(frozen=True)
class Session:
    """What a run is, and how long its services may take."""

    header: RunHeader
    folder: RunFolder
    max_steps: int | None
    """None: the metrics say it."""
    start_timeout_s: float
    shutdown_timeout_s: float

    def follow(self, services: Services, console: Console, stop: SignalCounter) -> None:
        """Show the run until it ends, then print its summary.

        Raises:
            ServiceFailed: a service died, the generator did not become ready, or the trainer failed.
        """
        probe = GeneratorProbe(services.url, services.token)
        progress = Progress(self.folder.path, self.max_steps, probe)
        if len({*self.header.generator_cpus, *self.header.trainer_cpus}) == 1:
            console.print("Only one CPU is available: generator and trainer take turns on it.")
        screen: Screen = LiveScreen(console, self.header) if console.is_terminal else PlainScreen(console, self.header)

        def show(footer: str) -> None:
            progress.poll()
            screen.update(progress, footer)

        with screen:
            self._wait(services, progress, stop, lambda: show(_RUNNING))
            _end(services.trainer, stop, _FINISH_STEP_TIMEOUT_S, lambda: show(_FINISHING))
            expected = (0, _TERMINATED) if stop.count else (0,)
            if stop.count < 2 and services.trainer.exit_code not in expected:
                raise ServiceFailed(services.trainer)
            if services.generator:
                timeout_s = self.shutdown_timeout_s + _GENERATOR_GRACE_S
                _end(services.generator, stop, timeout_s, lambda: show(_ENDING))
            progress.poll()
        show_summary(console, progress, self.folder.path)

    def _wait(self, services: Services, progress: Progress, stop: SignalCounter, show: Callable[[], None]) -> None:
        """Wait until the trainer has ended or the user has pressed Ctrl-C.

        Raises:
            ServiceFailed: the generator died, or did not become ready in time.
        """
        started: float | None = None
        while services.trainer.exit_code is None and not stop.count:
            services.poll()
            show()
            generator = services.generator
            if generator and generator.exit_code is not None:
                raise ServiceFailed(generator)
            started = started or (time.monotonic() if generator else None)
            if generator and started and not progress.was_ready and time.monotonic() > started + self.start_timeout_s:
                limit = f"{self.start_timeout_s:g} s (trainer.start_timeout_s)"
                raise ServiceFailed(generator, f"was not ready within {limit}: {progress.generator.reason}")
            time.sleep(POLL_S)


def _end(service: ServiceProcess, stop: SignalCounter, timeout_s: float, show: Callable[[], None]) -> None:
    """Send SIGTERM, then SIGKILL at the deadline or at the user's second Ctrl-C. Does nothing if it has ended."""
    service.terminate()
    deadline = time.monotonic() + timeout_s
    while service.exit_code is None and stop.count < 2 and time.monotonic() < deadline:
        show()
        time.sleep(POLL_S)
    service.kill()


def follow_preparation(script: ServiceProcess, console: Console, stop: SignalCounter) -> None:
    """Show the last line of the script's output until it ends.

    Raises:
        ServiceFailed: the script ended with an error.
    """
    console.print("Preparing the project with its prepare.py")
    with console.status("") as status:
        while script.exit_code is None and not stop.count:
            status.update(Text.from_ansi("".join(script.last_lines(1)), style="dim"))
            time.sleep(POLL_S)
    if script.exit_code:
        raise ServiceFailed(script)


def explain(failure: ServiceFailed) -> None:
    """Print what failed, and the last lines of its log."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    log = failure.service.log
    console.print(Text(f"error: {failure}. Last lines of {shown(log)}:", style="bold red"))
    for line in failure.service.last_lines():
        console.print(Text("  ") + Text.from_ansi(line))
