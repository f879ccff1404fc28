"""`tandem demo`: runs a project's generator and trainer on this machine and shows them on one screen."""

from __future__ import annotations

from contextlib import ExitStack

from rich.console import Console

from tandem_protocol.folders import require_writable
from tandem_protocol.processes import USER_ERROR

from .guard import adopt_orphans, end_descendants
from .processes import ServiceFailed
from .project import EngineName, Project
from .screen import RunHeader, shown
from .service_commands import start, start_preparation
from .session import Session, explain, follow_preparation
from .stop import SignalCounter


def demo(project: Project, engine: EngineName, *, resume: bool, plain: bool) -> int:
    """Prepare the project, train it on one screen and print a summary. No process is left behind.

    Returns:
        The exit code.

    Raises:
        ConfigError: another command writes the same run, or the run's folder cannot be written to.
    """
    console = Console(force_terminal=False if plain else None)
    adopt_orphans()
    with ExitStack() as cleanup:
        cleanup.enter_context(project.run.lock())
        if not resume and (aside := project.run.set_aside()):
            console.print(
                f"Renamed the earlier run to {shown(aside)} (--resume continues a run instead)", soft_wrap=True
            )
        require_writable(project.run.logs_dir, "trainer.output_dir")
        stop = cleanup.enter_context(SignalCounter())
        cleanup.callback(end_descendants)
        try:
            if (project.folder / "prepare.py").is_file():
                follow_preparation(start_preparation(project.folder, project.run, cleanup), console, stop)
            if not stop.count:
                _train(project, engine, console, stop, cleanup)
        except ServiceFailed as failure:
            explain(failure)
            return USER_ERROR if failure.exit_code == USER_ERROR else 1
    return stop.exit_code


def _train(project: Project, engine: EngineName, console: Console, stop: SignalCounter, cleanup: ExitStack) -> None:
    """Start the services, and follow the run until it ends.

    Raises:
        ServiceFailed: a service died, the generator did not become ready, or the trainer wrote no final checkpoint.
    """
    settings = project.settings
    weights_dir = cleanup.enter_context(project.run.weights_dir(project.folder / settings.shared.model))
    pair = start(project, engine, weights_dir, cleanup)
    header = RunHeader(
        project=project.folder.name,
        model=settings.shared.model,
        engine=engine,
        run_dir=shown(project.run_dir),
        generator_cpus=pair.generator.cpus,
        trainer_cpus=pair.trainer.cpus,
    )
    session = Session(
        header=header,
        folder=project.run,
        max_steps=settings.trainer.max_steps,
        start_timeout_s=settings.trainer.start_timeout_s,
        shutdown_timeout_s=settings.generator.shutdown_timeout_s,
    )
    session.follow(pair, console, stop)
