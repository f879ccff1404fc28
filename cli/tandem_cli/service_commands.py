"""Starts a project's services: their commands, environment and CPUs."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tandem_protocol.config import TOKEN_ENV, TOKEN_FILE_ENV

from .processes import ServiceProcess, choose_cpus
from .project import EngineName, Project
from .run_folder import RunFolder

_OFFLINE = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


@dataclass
class Pair:
    """A running generator and its trainer."""

    generator: ServiceProcess
    trainer: ServiceProcess
    url: str
    token: str

    def poll(self) -> None:
        """Do nothing: both are started at once."""


def start(project: Project, engine: EngineName, weights_dir: Path, cleanup: ExitStack) -> Pair:
    """Start both services at once: the trainer loads its model while the generator becomes ready.

    Args:
        cleanup: gets a callback that kills the services.
    """
    take_turns = project.settings.trainer.max_lag == 0
    generator_cpus, trainer_cpus = choose_cpus(sorted(os.sched_getaffinity(0)), take_turns=take_turns)
    has_chosen_port = "generator.port" in project.overrides
    port = project.settings.generator.port if has_chosen_port else free_port()
    token = secrets.token_urlsafe(32)
    url = f"http://127.0.0.1:{port}"
    env = environment(
        {
            TOKEN_ENV: token,  # not an argument: every user of the machine can read command lines
            "TANDEM__SHARED__GENERATORS": json.dumps([url]),
            "TANDEM__SHARED__WEIGHTS_DIR": str(weights_dir),
        }
    )

    def service(name: str, command: list[str], cpus: tuple[int, ...]) -> ServiceProcess:
        log = project.run.logs_dir / f"{name}.log"
        started = ServiceProcess(name, command, folder=project.folder, env=env, cpus=cpus, log=log, scratch=weights_dir)
        cleanup.callback(started.kill)
        return started

    options = [] if has_chosen_port else ["--port", str(port)]
    generator = service("generator", [*_generator_command(project, engine), *options], generator_cpus)
    return Pair(generator, service("trainer", _trainer_command(project), trainer_cpus), url, token)


def start_preparation(folder: Path, run: RunFolder, cleanup: ExitStack) -> ServiceProcess:
    """Start the prepare.py of a folder on all CPUs. `cleanup` gets a callback that kills it."""
    script = ServiceProcess(
        "preparation",
        [sys.executable, "prepare.py"],
        folder=folder,
        env=environment({}),
        cpus=sorted(os.sched_getaffinity(0)),
        log=run.logs_dir / "prepare.log",
    )
    cleanup.callback(script.kill)
    return script


def check(project: Project, engine: EngineName) -> int:
    """Run both services with --check, which prints their resolved configuration. Return the worse exit code."""
    commands = [_generator_command(project, engine), _trainer_command(project)]
    return max(subprocess.run([*c, "--check"], cwd=project.folder, check=False).returncode for c in commands)


def _generator_command(project: Project, engine: EngineName) -> list[str]:
    command = [sys.executable, "-m", "tandem_generator", "--config", str(project.config)]
    overrides = project.overrides_for("generator")
    if engine != project.settings.generator.engine:
        command += ["--engine", engine]
        overrides = [override for override in overrides if "--generator.engine=" not in override]
    return [*command, *overrides]


def _trainer_command(project: Project) -> list[str]:
    command = [sys.executable, "-m", "tandem_trainer", "--config", str(project.config)]
    return [*command, *project.overrides_for("trainer")]


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment and `extra`. Usage statistics are off unless the user has turned them on."""
    inherited = {name: value for name, value in os.environ.items() if name != TOKEN_FILE_ENV}
    return {**_OFFLINE, **inherited, **extra}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
