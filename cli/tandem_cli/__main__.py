"""The `tandem` command. Each command imports its modules when it runs, so that none needs the libraries of another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tandem_protocol.config import ConfigError, parse_overrides
from tandem_protocol.processes import USER_ERROR

from .parser import make_parser


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
    from .extras import require

    services = ("tandem_generator", "tandem_trainer")
    require("tandem demo", "demo", libraries=("matplotlib", "psutil"), services=services)
    from .demo import demo
    from .project import Project, choose_engine
    from .service_commands import check

    project = Project.read(arguments.project, parse_overrides(rest))
    project.require_packages()
    engine, note = choose_engine(arguments.engine or project.settings.generator.engine)
    if note:
        _note(note)
    if arguments.check:
        return check(project, engine)
    return demo(project, engine, resume=arguments.resume, plain=arguments.plain)


def _run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from .extras import require

    services = ("tandem_generator", "tandem_trainer")
    require("tandem run", "demo", libraries=("matplotlib", "psutil"), services=services)
    from .project import choose_engine
    from .run import run
    from .script import Gpus, Script, with_mock

    model = arguments.model and (
        Path(arguments.model).absolute() if Path(arguments.model).is_dir() else arguments.model
    )
    named = {"shared.model": model, "generator.port": arguments.port}
    script = Script.read(
        arguments.script,
        arguments.arguments,
        config=arguments.config,
        overrides=parse_overrides(rest) | {key: str(value) for key, value in named.items() if value is not None},
        processes=arguments.processes,
        gpus=Gpus.read(arguments.generator_gpus, arguments.trainer_gpus),
    )
    engine, note = choose_engine("mock" if arguments.mock else script.engine)
    if note:
        _note(note)
    return run(with_mock(script) if engine == "mock" else script, resume=arguments.resume, plain=arguments.plain)


def _watch(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from .extras import require

    _refuse(rest)
    require("tandem watch", "watch", libraries=("fastapi", "plotly", "uvicorn"))
    from tandem_protocol import logs
    from tandem_protocol.printed import capture_output

    from .watch.command import watch

    if bool(arguments.runs) == bool(arguments.parent):
        raise ConfigError(
            f"got {'--all and the' if arguments.runs else 'no --all and no'} folder of a run, expected one of the two. "
            "Fix: tandem watch PROJECT/runs/NAME, or tandem watch --all PROJECT/runs"
        )
    logs.configure()
    capture_output()
    return watch(arguments.runs, parent=arguments.parent, host=arguments.host, port=arguments.port, url=arguments.url)


def _runs(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from .run_list.command import compare_runs, list_runs
    from .run_list.options import COMPARE

    _refuse(rest)
    if arguments.runs_command == COMPARE:
        return compare_runs(arguments.runs, as_json=arguments.json, save=arguments.save)
    return list_runs(arguments.folder, as_json=arguments.json)


def _gpus(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from .checkout import COMPOSE_FILES, find_checkout
    from .gpus import gpus

    _refuse(rest)
    folder = find_checkout(arguments.directory)
    for note in gpus(
        arguments.generator,
        arguments.trainer,
        driver=arguments.driver,
        tensor_parallel=arguments.tensor_parallel,
        project=arguments.project,
        folder=folder,
    ):
        _note(note)
    where = "" if folder.resolve() == Path.cwd() else f" in {folder}"
    print(f"Wrote {folder / COMPOSE_FILES[2]} and .env beside it: `docker compose up`{where} uses them.")
    return 0


def _doctor(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from .doctor import doctor

    _refuse(rest)
    return doctor(arguments.project, as_json=arguments.json)


def _export(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from .export import export

    _refuse(rest)
    step = export(arguments.run_dir, arguments.checkpoint, arguments.to)
    print(f"Wrote the model after step {step} to {arguments.to}")
    return 0


def _plan(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from .plan.command import plan

    _refuse(rest)
    return plan(arguments)


def _completion(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from .completion import completion

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
    "run": _run,
    "watch": _watch,
    "runs": _runs,
    "gpus": _gpus,
    "doctor": _doctor,
    "export": _export,
    "plan": _plan,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())
