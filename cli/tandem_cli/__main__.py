"""The `tandem` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem_protocol.config import ConfigError, parse_overrides

from .demo import USER_ERROR, demo
from .launch import check
from .project import Project, choose_engine


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a mistake of the person's, 1 for a failure, 130 or 143 after a signal."""
    arguments, rest = _parser().parse_known_args(argv)
    try:
        project = Project.read(arguments.project, parse_overrides(rest))
        engine, note = choose_engine(arguments.engine or project.settings.generator.engine)
        if note:
            print(f"note: {note}", file=sys.stderr)
        if arguments.check:
            return check(project, engine)
        return demo(project, engine, resume=arguments.resume, plain=arguments.plain)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tandem", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
