"""`python -m tandem_trainer --config PROJECT/config.yaml`, also under `accelerate launch -m`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem_protocol import logs
from tandem_protocol.config import ConfigError, SharedConfig, format_resolved, load, parse_overrides
from tandem_protocol.config.help import ServiceParser, add_keys
from tandem_protocol.config.trainer import TrainerConfig, TrainerSettings
from tandem_protocol.processes import reporting

from .run.stopping import Terminated, exit_status

_DESCRIPTION = """
Train a project's model on completions from its generators. Any key of config.yaml can be set on the command line, such
as --trainer.max_steps 5; this help lists the keys, and docs/reference/config.md describes them at length.
"""
_EPILOG = """
examples:
  # train the project; the same command resumes it from the last checkpoint
  python -m tandem_trainer --config project/config.yaml

  # other settings, without an edit of the file
  python -m tandem_trainer --config project/config.yaml \\
      --trainer.max_steps 5 --trainer.optim.learning_rate 1e-5

  # a list or a mapping is YAML; the quotes keep it from the shell
  python -m tandem_trainer --config project/config.yaml \\
      --trainer.rewards '[{function: "rewards:exact_match", weight: 0.5}]'

  # several processes of one machine
  accelerate launch --multi_gpu --num_processes 4 \\
      -m tandem_trainer --config project/config.yaml

  # print every setting with its source, and train nothing
  python -m tandem_trainer --config project/config.yaml --check

`python -m tandem_trainer.launch --help` describes how the images start several processes.

environment:
  TANDEM__SECTION__KEY   sets a YAML key: TANDEM__TRAINER__MAX_STEPS=5
  TANDEM_TOKEN           bearer token, the same on both sides
  TANDEM_TOKEN_FILE      file with the token, instead of TANDEM_TOKEN

The command line wins over the environment, the environment over config.yaml, and config.yaml over the defaults.

exit codes:
  0    the run is finished
  1    the run failed; another try may succeed
  2    a setting, the project or a generator is wrong; the message says what
  130  stopped by Ctrl-C; the same command resumes the run
  143  stopped by SIGTERM; the same command resumes the run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train until the run ends, and return the exit code (see `--help`)."""
    return reporting(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    try:
        logs.configure()
        path, check, overrides = parse(sys.argv[1:] if argv is None else argv)
        settings, sources = load(TrainerSettings, path=path, overrides=overrides)
        resolved = format_resolved(settings, sources)
        if check == "settings":
            print(resolved)
            return 0
        from . import process  # imports torch, which takes seconds that --help and --check do not need

        if check == "project":
            return process.check_project(settings, path.parent)
        return process.train(settings, resolved, path.parent)
    except ConfigError as error:
        logs.report_error(error)
        return 2
    except KeyboardInterrupt as stopped:
        return exit_status(signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT)


def parse(argv: Sequence[str]) -> tuple[Path, str | None, dict[str, str]]:
    """Return `--config`, what to check only (`settings` or `project`), and the overrides.

    Overrides are `--trainer.max_steps 5` or `--trainer.max_steps=5`.

    Raises:
        ConfigError: an argument is none of these, or an override has no value.
    """
    known, rest = _parser().parse_known_args(argv)
    return known.config.absolute(), known.check, parse_overrides(rest)


def _parser() -> argparse.ArgumentParser:
    usage = "--config FILE [--check | --check-project]\n           [--SECTION.KEY VALUE ...]"
    parser = ServiceParser("tandem_trainer", usage, _DESCRIPTION, _EPILOG, _list_keys)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE",
                        help="The project's config.yaml. (required)")  # fmt: skip
    check = parser.add_mutually_exclusive_group()
    check.add_argument("--check", action="store_const", const="settings",
                       help="Print every setting with its source, and exit.")  # fmt: skip
    check.add_argument("--check-project", dest="check", action="store_const", const="project",
                       help="Read the prompts, import the rewards, and exit. Needs no generator.")  # fmt: skip
    return parser


def _list_keys(parser: argparse.ArgumentParser) -> None:
    """Add the keys of the YAML to the help."""
    for section, model in (("shared", SharedConfig), ("trainer", TrainerConfig)):
        add_keys(parser, section, model, omit=lambda _: False)


if __name__ == "__main__":
    sys.exit(main())
