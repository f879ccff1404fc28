"""`tandem run train.py`: runs a TRL script and its generator on this machine and shows them on one screen."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from tandem_protocol.config import TOKEN_ENV
from tandem_protocol.folders import require_writable
from tandem_protocol.processes import USER_ERROR
from tandem_protocol.script import NEEDS_ENV, SCRIPT_ENV, ScriptNeeds

from .guard import adopt_orphans, end_descendants
from .processes import ServiceFailed, ServiceProcess, choose_cpus
from .screen import RunHeader, shown
from .script import Script
from .service_commands import environment, free_port, start_preparation
from .session import Session, explain, follow_preparation
from .stop import SignalCounter


class ScriptServices:
    """A script in its trainer processes, and its generator, which starts when its model is known."""

    def __init__(self, script: Script, weights_dir: Path, cleanup: ExitStack, *, resume: bool) -> None:
        """Start the script, and the generator if the settings name the model.

        Args:
            cleanup: gets callbacks that kill the services.
        """
        self.generator: ServiceProcess | None = None
        # A script waits for its completions. On GPUs the CPUs are not what limits it.
        cpus = sorted(os.sched_getaffinity(0))
        self.generator_cpus, trainer_cpus = choose_cpus(cpus, take_turns=not script.gpus.trainer)
        self.token = secrets.token_urlsafe(32)
        has_port = "generator.port" in script.sources
        self._port = script.settings.generator.port if has_port else free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._script, self._weights_dir, self._cleanup = script, weights_dir, cleanup
        self._needs = weights_dir / "needs.json"
        self._config = [] if script.config is None else ["--config", str(script.config.absolute())]
        if script.model:
            self._start_generator(None)
        launcher = [sys.executable, "-m", "tandem_trainer.launch", *self._config, *["--resume"] * resume]
        variables = {
            SCRIPT_ENV: script.command,
            NEEDS_ENV: str(self._needs),
            "TANDEM_TRAINER_PROCESSES": str(script.processes),
            "TANDEM__SHARED__GENERATORS": json.dumps([self.url]),
            "TANDEM__TRAINER__OUTPUT_DIR": str(script.run.path.parent),
            "TANDEM__TRAINER__RUN_NAME": script.run.path.name,
            "TANDEM__TRAINER__START_TIMEOUT_S": str(script.start_timeout_s),
        }
        visible = script.gpus.trainer
        self.trainer = self._start("trainer", launcher, trainer_cpus, script.environment() | variables, visible)

    def poll(self) -> None:
        """Start the generator when the script has said which model it trains."""
        if self.generator is None and (needs := ScriptNeeds.read(self._needs)):
            self._start_generator(needs)

    def _start_generator(self, needs: ScriptNeeds | None) -> None:
        command = [sys.executable, "-m", "tandem_generator", *self._config, "--port", str(self._port)]
        variables = self._script.environment(needs)
        visible = self._script.gpus.generator
        self.generator = self._start("generator", command, self.generator_cpus, variables, visible)

    def _start(
        self, name: str, command: list[str], cpus: tuple[int, ...], variables: dict[str, str], gpus: tuple[str, ...]
    ) -> ServiceProcess:
        common = {TOKEN_ENV: self.token, "TANDEM__SHARED__WEIGHTS_DIR": str(self._weights_dir / "store")}
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        service = ServiceProcess(
            name,
            command,
            folder=Path.cwd(),
            env=environment(variables | common | devices),
            cpus=cpus,
            log=self._script.run.logs_dir / f"{name}.log",
            scratch=self._weights_dir,
        )
        self._cleanup.callback(service.kill)
        return service


def run(script: Script, *, resume: bool, plain: bool) -> int:
    """Run the script with a generator on one screen, and print a summary. No process is left behind.

    Returns:
        The exit code.

    Raises:
        ConfigError: another command writes the same run, or the run's folder cannot be written to.
    """
    console = Console(force_terminal=False if plain else None)
    adopt_orphans()
    with ExitStack() as cleanup:
        cleanup.enter_context(script.run.lock())
        if not resume and (aside := script.run.set_aside()):
            console.print(f"Renamed the files of the earlier run to {shown(aside)}", soft_wrap=True)
        require_writable(script.run.logs_dir, "trainer.output_dir")
        stop = cleanup.enter_context(SignalCounter())
        cleanup.callback(end_descendants)
        try:
            if script.has_preparation:
                follow_preparation(start_preparation(script.path.parent.absolute(), script.run, cleanup), console, stop)
            if not stop.count:
                _train(script, console, stop, cleanup, resume=resume)
        except ServiceFailed as failure:
            explain(failure)
            return USER_ERROR if failure.exit_code == USER_ERROR else 1
    if stop.count:
        console.print(f"To go on from the last checkpoint: {_resume_command()}", soft_wrap=True, highlight=False)
    return stop.exit_code


def _train(script: Script, console: Console, stop: SignalCounter, cleanup: ExitStack, *, resume: bool) -> None:
    weights_dir = cleanup.enter_context(script.run.weights_dir(Path(script.model or "")))
    services = ScriptServices(script, weights_dir, cleanup, resume=resume)
    header = RunHeader(
        project=str(script.path),
        model=script.model or "that of the script",
        engine=script.engine,
        run_dir=shown(script.run.path),
        generator_cpus=services.generator_cpus,
        trainer_cpus=services.trainer.cpus,
    )
    session = Session(
        header=header,
        folder=script.run,
        max_steps=None,
        start_timeout_s=script.start_timeout_s,
        shutdown_timeout_s=script.settings.generator.shutdown_timeout_s,
    )
    session.follow(services, console, stop)


def _resume_command() -> str:
    """Return the command of this process with `--resume`."""
    words = sys.argv[1:]
    place = words.index("run") + 1
    return shlex.join(["tandem", *words[:place], *["--resume"] * ("--resume" not in words), *words[place:]])
