"""`python -m tandem_trainer.trl train.py ARGUMENTS`, also under `accelerate launch -m`."""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem_protocol import logs
from tandem_protocol.config import ConfigError
from tandem_protocol.errors import TandemError
from tandem_protocol.printed import capture_output
from tandem_protocol.processes import reporting
from tandem_protocol.script import NEEDS_ENV

from ..run.stopping import exit_status

_DESCRIPTION = "Run a TRL script on Tandem's generators, without a change to the script."
_EPILOG = """
environment:
  TANDEM__SHARED__GENERATORS    base URLs of the generators; default: the script's vllm_server_base_url or host and port
  TANDEM__SHARED__WEIGHTS_DIR   directory of the weight store, the same as the generators'; default: weights
  TANDEM__TRAINER__OUTPUT_DIR   folder of the run's folder, which has the script's name; default: runs
  TANDEM_TOKEN                  bearer token of the generators
  TANDEM_TOKEN_FILE             file with the token, instead of TANDEM_TOKEN

exit codes:
  0    the script ended without an error
  1    the script failed
  2    the script asks for something that is not supported, or a setting is wrong; the message says what
  130  stopped by Ctrl-C, with a checkpoint; --resume continues from it
  143  stopped by SIGTERM, with a checkpoint; --resume continues from it
  other: the script's own
"""
USER_ERROR, FAILED = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script as `python train.py` would, and return its exit code (see `--help`)."""
    return reporting(lambda: _run(parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Everything after the script belongs to the script."""
    parser = argparse.ArgumentParser(
        "python -m tandem_trainer.trl",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with the sections shared and trainer.")
    parser.add_argument("--resume", action="store_true", help="Begin at the newest checkpoint of the trainer's output.")
    parser.add_argument(
        "--rehearse", action="store_true", help="End when the script has made its trainer. Needs no generator."
    )
    parser.add_argument("script", type=Path, help="The TRL script.")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="The arguments of the script.")
    return parser.parse_args(argv)


def _run(given: argparse.Namespace) -> int:
    try:
        _show_log()
        if not given.script.is_file():
            raise ConfigError(f"got {given.script}, expected the file of a TRL script. Fix: check its path.")
        sys.argv = [str(given.script), *given.arguments]
        from .start import Start  # imports torch, which takes seconds that --help does not need
        from .takeover import use

        use(config=given.config, start=Start(resume=given.resume, is_rehearsal=given.rehearse))
        sys.path[0] = str(given.script.absolute().parent)
        runpy.run_path(str(given.script), run_name="__main__")
        if (file := os.environ.get(NEEDS_ENV)) and not Path(file).exists():
            raise ConfigError(
                f"got {given.script}, which made no trainer with use_vllm=True and vllm_mode='server', so it used no "
                "generator. Fix: set both in the trainer's arguments."
            )
    except (ConfigError, TandemError, TimeoutError) as error:
        logs.report_error(error)
        return USER_ERROR if isinstance(error, ConfigError) else FAILED
    except KeyboardInterrupt:
        return exit_status(signal.SIGINT)
    return 0


def _show_log() -> None:
    """Show what Tandem logs. The logging of the script stays as the script has it; with JSON, its lines are records."""
    formatter = logs.make_formatter({})
    try:
        formatter = logs.make_formatter(os.environ)
    finally:
        for package in ("tandem_protocol", "tandem_rollout", "tandem_trainer"):
            logger = logging.getLogger(package)
            logger.setLevel(logging.INFO)
            logger.handlers = list(logs.handlers(formatter))
            logger.propagate = False
    capture_output()


if __name__ == "__main__":
    sys.exit(main())
