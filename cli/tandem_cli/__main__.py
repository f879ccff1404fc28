"""The `tandem` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from tandem_protocol.config import ConfigError, parse_overrides

from .demo import USER_ERROR, demo
from .doctor import doctor
from .export import export
from .gpus import COMPOSE_FILES, gpus
from .project import Project, choose_engine
from .service_commands import check

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a mistake of the person's, 1 for a failure, 130 or 143 after a signal."""
    arguments, rest = _parser().parse_known_args(argv)
    try:
        code: int = arguments.run(arguments, rest)
        return code
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:  # such as a full disk
        print(f"error: {error}", file=sys.stderr)
        return 1


def _demo(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    project = Project.read(arguments.project, parse_overrides(rest))
    engine, note = choose_engine(arguments.engine or project.settings.generator.engine)
    if note:
        _note(note)
    if arguments.check:
        return check(project, engine)
    return demo(project, engine, resume=arguments.resume, plain=arguments.plain)


def _gpus(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    _refuse(rest)
    for note in gpus(
        arguments.generator,
        arguments.trainer,
        driver=arguments.driver,
        tensor_parallel=arguments.tensor_parallel,
        project=arguments.project,
        folder=arguments.directory,
    ):
        _note(note)
    print(f"Wrote {arguments.directory / COMPOSE_FILES[2]} and .env beside it: `docker compose up` uses them.")
    return 0


def _doctor(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    _refuse(rest)
    return doctor(arguments.project, as_json=arguments.json)


def _export(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    _refuse(rest)
    step = export(arguments.run_dir, arguments.checkpoint, arguments.to)
    print(f"Wrote the model after step {step} to {arguments.to}")
    return 0


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _refuse(rest: Sequence[str]) -> None:
    """For a command that takes no overrides.

    Raises:
        ConfigError: there is one.
    """
    if rest:
        raise ConfigError(f"got {' '.join(rest)}, which this command does not take; --help lists what it takes")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tandem", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_gpus(commands)
    _add_doctor(commands)
    _add_export(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    run = commands.add_parser(
        "demo",
        help="train a project on this machine and watch it",
        description=(
            "Starts a project's generator and trainer on this machine, shows the run and sums it up. Any key of "
            "config.yaml can be set on the command line: --trainer.max_steps 5."
        ),
        epilog=(
            "A demo starts over: an earlier run's folder is renamed (runs/digits to runs/digits.1), never deleted. "
            "Exit code: 0; 2 for a mistake in the project; 1 when a service died; 130 after Ctrl-C, 143 after SIGTERM."
        ),
        allow_abbrev=False,
    )
    run.add_argument("project", nargs="?", type=Path, default=Path("examples/digits"), metavar="PROJECT",
                     help="folder with config.yaml (default: %(default)s)")  # fmt: skip
    run.add_argument("--engine", choices=("vllm", "mock"), help="default: generator.engine of the project, or vllm")
    run.add_argument("--resume", action="store_true", help="continue the earlier run from its last checkpoint")
    run.add_argument("--check", action="store_true", help="print the resolved configuration and exit")
    run.add_argument("--plain", action="store_true", help="one line a step; so it is where output is no terminal")
    run.set_defaults(run=_demo)


def _add_gpus(commands: Commands) -> None:
    run = commands.add_parser(
        "gpus",
        help="give each service of the compose stack its GPUs",
        description=(
            "Writes compose.devices.yaml, which gives each service of the compose stack its own GPUs, and .env, so "
            "that `docker compose up` uses it."
        ),
        epilog="DEVICES: indexes, ranges, UUIDs or CDI names, with commas between them: 0-3 or 0,2,GPU-8932f937-….",
        allow_abbrev=False,
    )
    run.add_argument("--generator", required=True, metavar="DEVICES", help="the generator's")
    run.add_argument("--trainer", required=True, metavar="DEVICES", help="the trainer's, one process each")
    run.add_argument("--driver", choices=("nvidia", "cdi"), default="nvidia",
                     help="who hands them out: NVIDIA's container runtime, or CDI (default: %(default)s)")  # fmt: skip
    run.add_argument("--tensor-parallel", type=int, metavar="N",
                     help="GPUs that share one copy of the model (default: all of the generator's)")  # fmt: skip
    run.add_argument("--project", type=Path, metavar="DIR", help="the stack's project (default: TANDEM_PROJECT)")
    run.add_argument("--directory", type=Path, default=Path(), metavar="DIR",
                     help="where compose.yaml is (default: here)")  # fmt: skip
    run.set_defaults(run=_gpus)


def _add_doctor(commands: Commands) -> None:
    run = commands.add_parser(
        "doctor",
        help="check this machine for the compose stack, and say how to fix what is wrong",
        description=(
            "Checks, in the folder of compose.yaml, whether `docker compose up` will run here: the engine, the merged "
            "configuration with its overrides and .env, images, devices, memory, disk, model."
        ),
        epilog="Exit code: 0; 1 when a check says FAIL; 2 for a mistake on the command line.",
        allow_abbrev=False,
    )
    run.add_argument("--project", type=Path, metavar="DIR", help="the stack's project (default: TANDEM_PROJECT)")
    run.add_argument("--json", action="store_true", help="print the findings as JSON")
    run.set_defaults(run=_doctor)


def _add_export(commands: Commands) -> None:
    run = commands.add_parser(
        "export",
        help="write a checkpoint as a plain Hugging Face folder",
        description="Copies a checkpoint's model and tokenizer: a folder for vLLM, transformers or the hub.",
        allow_abbrev=False,
    )
    run.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder: PROJECT/runs/NAME")
    run.add_argument("--checkpoint", default="last", metavar="WHICH",
                     help="last, a step, or best: of the best evaluation (default: %(default)s)")  # fmt: skip
    run.add_argument("--to", required=True, type=Path, metavar="DIR", help="a new folder")
    run.set_defaults(run=_export)


if __name__ == "__main__":
    sys.exit(main())
