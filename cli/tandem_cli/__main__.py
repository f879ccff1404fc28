"""The `tandem` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from tandem_protocol.config import ConfigError, parse_overrides

from .completion import completion
from .demo import USER_ERROR, demo
from .doctor import doctor
from .export import export
from .gpus import COMPOSE_FILES, gpus
from .parser import make_parser
from .project import Project, choose_engine
from .service_commands import check


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0, 1 for a failure, 2 for a user error, 130 or 143 after a signal."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    try:
        if arguments.command is None:
            _refuse(rest)
            parser.print_help()
            return 0
        return COMMANDS[arguments.command](arguments, rest)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:  # such as a full disk
        print(f"error: {error}", file=sys.stderr)
        return 1


def _demo(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    project = Project.read(arguments.project, parse_overrides(rest))
    project.require_packages()
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


def _completion(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    _refuse(rest)
    print(completion(make_parser(), arguments.shell))
    return 0


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _refuse(rest: Sequence[str]) -> None:
    """Check that a command which takes no overrides got none.

    Raises:
        ConfigError: there is one.
    """
    if rest:
        raise ConfigError(
            f"got {' '.join(rest)}, which this command does not accept. Fix: remove it. --help lists the options"
        )


COMMANDS: dict[str, Callable[[argparse.Namespace, Sequence[str]], int]] = {
    "demo": _demo,
    "gpus": _gpus,
    "doctor": _doctor,
    "export": _export,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())
