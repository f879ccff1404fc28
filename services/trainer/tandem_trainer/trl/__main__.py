"""`python -m tandem_trainer.trl train.py ARGUMENTS`, also under `accelerate launch -m`."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem_protocol import logs
from tandem_protocol.config import ConfigError
from tandem_protocol.errors import TandemError

_DESCRIPTION = "Run a TRL script on Tandem's generators, without a change to the script."
_EPILOG = """
environment:
  TANDEM__SHARED__GENERATORS    base URLs of the generators; default: the script's vllm_server_base_url or host and port
  TANDEM__SHARED__WEIGHTS_DIR   directory of the weight store, the same as the generators'; default: weights
  TANDEM_TOKEN                  bearer token of the generators
  TANDEM_TOKEN_FILE             file with the token, instead of TANDEM_TOKEN
"""
USER_ERROR, FAILED = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script as `python train.py` would, and return its exit code: 2 for a user error of Tandem."""
    parser = argparse.ArgumentParser(
        "python -m tandem_trainer.trl",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", type=Path, help="The TRL script.")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="The arguments of the script.")
    given = parser.parse_args(argv)
    try:
        if not given.script.is_file():
            raise ConfigError(f"got {given.script}, expected the file of a TRL script. Fix: check its path.")
        from .takeover import use  # imports torch, which takes seconds that --help does not need

        use()
        sys.argv = [str(given.script), *given.arguments]
        sys.path[0] = str(given.script.absolute().parent)
        runpy.run_path(str(given.script), run_name="__main__")
    except (ConfigError, TandemError, TimeoutError) as error:
        logs.report_error(error)
        return USER_ERROR if isinstance(error, ConfigError) else FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
