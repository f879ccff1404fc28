"""`tandem demo`: runs a project's generator and trainer on this machine and shows them on one screen."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack

from rich.console import Console
from rich.text import Text

from tandem_protocol.folders import require_writable
from tandem_protocol.processes import USER_ERROR

from .guard import adopt_orphans, end_descendants
from .processes import ServiceFailed, ServiceProcess
from .progress import GeneratorProbe, Progress
from .project import EngineName, Project
from .screen import LiveScreen, PlainScreen, RunHeader, Screen, shown
from .service_commands import Pair, start, start_preparation
from .stop import SignalCounter
from .summary import show_summary

_POLL_S = 0.2
_FINISH_STEP_TIMEOUT_S = 120.0
"""Time that the trainer has, after Ctrl-C, to finish its step and write a checkpoint."""
_GENERATOR_GRACE_S = 5.0
"""Time that the generator has to end, on top of its own shutdown timeout."""

_TERMINATED = 128 + signal.SIGTERM
"""Exit code of a trainer that got SIGTERM before it had installed its handler."""

_RUNNING = "Ctrl-C finishes the step, writes a checkpoint and ends"
_FINISHING = "finishing the step and writing a checkpoint; press Ctrl-C again to kill"
_ENDING = "stopping the generator"


def demo(project: Project, engine: EngineName, *, resume: bool, plain: bool) -> int:
    """Prepare the project, train it on one screen and print a summary. No process is left behind.

    Returns:
        The exit code.

    Raises:
        ConfigError: another demo writes the same run, or the run's folder cannot be written to.
    """
    console = Console(force_terminal=False if plain else None)
    adopt_orphans()
    with ExitStack() as cleanup:
        cleanup.enter_context(project.lock())
        if not resume and (aside := project.set_earlier_run_aside()):
            console.print(
                f"Renamed the earlier run to {shown(aside)} (--resume continues a run instead)", soft_wrap=True
            )
        require_writable(project.logs_dir, "trainer.output_dir")
        stop = cleanup.enter_context(SignalCounter())
        cleanup.callback(end_descendants)
        try:
            if (project.folder / "prepare.py").is_file():
                _prepare(start_preparation(project, cleanup), console, stop)
            if not stop.count:
                weights_dir = cleanup.enter_context(project.weights_dir())
                _train(project, engine, start(project, engine, weights_dir, cleanup), console, stop)
        except ServiceFailed as failure:
            _explain(failure)
            return USER_ERROR if failure.exit_code == USER_ERROR else 1
    return stop.exit_code


def _prepare(script: ServiceProcess, console: Console, stop: SignalCounter) -> None:
    """Show the last line of the script's output until it ends.

    Raises:
        ServiceFailed: the script ended with an error.
    """
    console.print("Preparing the project with its prepare.py")
    with console.status("") as status:
        while script.exit_code is None and not stop.count:
            status.update(Text.from_ansi("".join(script.last_lines(1)), style="dim"))
            time.sleep(_POLL_S)
    if script.exit_code:
        raise ServiceFailed(script)


def _train(project: Project, engine: EngineName, pair: Pair, console: Console, stop: SignalCounter) -> None:
    """Show the run until it ends, then print its summary.

    Raises:
        ServiceFailed: a service died, the generator did not become ready, or the trainer wrote no final checkpoint.
    """
    settings = project.settings
    header = RunHeader(
        project=project.folder.name,
        model=settings.shared.model,
        engine=engine,
        run_dir=shown(project.run_dir),
        generator_cpus=pair.generator.cpus,
        trainer_cpus=pair.trainer.cpus,
    )
    progress = Progress(project.run_dir, settings.trainer.max_steps, GeneratorProbe(pair.url, pair.token))
    if set(pair.generator.cpus) & set(pair.trainer.cpus):
        console.print("Only one CPU is available: generator and trainer take turns on it.")
    screen: Screen = LiveScreen(console, header) if console.is_terminal else PlainScreen(console, header)

    def show(footer: str) -> None:
        progress.poll()
        screen.update(progress, footer)

    with screen:
        _follow(pair, progress, stop, settings.trainer.start_timeout_s, lambda: show(_RUNNING))
        _end(pair.trainer, stop, _FINISH_STEP_TIMEOUT_S, lambda: show(_FINISHING))
        expected = (0, _TERMINATED) if stop.count else (0,)
        if stop.count < 2 and pair.trainer.exit_code not in expected:
            raise ServiceFailed(pair.trainer)
        _end(pair.generator, stop, settings.generator.shutdown_timeout_s + _GENERATOR_GRACE_S, lambda: show(_ENDING))
        progress.poll()
    show_summary(console, progress, project.run_dir)


def _follow(
    pair: Pair, progress: Progress, stop: SignalCounter, start_timeout_s: float, show: Callable[[], None]
) -> None:
    """Wait until the trainer has ended or the user has pressed Ctrl-C.

    Raises:
        ServiceFailed: the generator died, or did not become ready in time.
    """
    ready_by = time.monotonic() + start_timeout_s
    while pair.trainer.exit_code is None and not stop.count:
        show()
        if pair.generator.exit_code is not None:
            raise ServiceFailed(pair.generator)
        if not progress.was_ready and time.monotonic() > ready_by:
            reason = (
                f"was not ready within {start_timeout_s:g} s (trainer.start_timeout_s): {progress.generator.reason}"
            )
            raise ServiceFailed(pair.generator, reason)
        time.sleep(_POLL_S)


def _end(service: ServiceProcess, stop: SignalCounter, timeout_s: float, show: Callable[[], None]) -> None:
    """Send SIGTERM, then SIGKILL at the deadline or at the user's second Ctrl-C. Does nothing if it has ended."""
    service.terminate()
    deadline = time.monotonic() + timeout_s
    while service.exit_code is None and stop.count < 2 and time.monotonic() < deadline:
        show()
        time.sleep(_POLL_S)
    service.kill()


def _explain(failure: ServiceFailed) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    log = failure.service.log
    console.print(Text(f"error: {failure}. Last lines of {shown(log)}:", style="bold red"))
    for line in failure.service.last_lines():
        console.print(Text("  ") + Text.from_ansi(line))
