"""`python -m tandem_rollout.server`: serve the project's tools and environments over HTTP, for trainers elsewhere."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from tandem_protocol import logs
from tandem_protocol.config import (
    ENVIRONMENT_TOKEN_ENV,
    ENVIRONMENT_TOKEN_FILE_ENV,
    ConfigError,
    format_resolved,
    load,
    parse_overrides,
    read_environment_token,
)
from tandem_protocol.config.help import ServiceParser, add_keys
from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.config.trainer import TrainerConfig, TrainerSettings
from tandem_protocol.end_file import EndFile
from tandem_protocol.lock import project_in_use
from tandem_protocol.ports import listen
from tandem_protocol.printed import capture_output

from .environments.classes import ClassEnvironments
from .environments.loading import load_environments
from .environments.routes import build_app
from .environments.served import Sessions
from .errors import UserError

_KEEP_ALIVE_S = 75
"""How long an unused connection stays open. Longer than clients keep it, so that they never use one that was closed."""
_PREFIX = "trainer.rollout."
_DESCRIPTION = """
Serve the tools and environments of a project over HTTP. A trainer whose trainer.rollout.environment_urls has the URL of
this server plays its episodes here. Both read the same config.yaml. The server needs neither the model nor a GPU.
"""
_EPILOG = """
examples:
  # serve the environment of the project
  python -m tandem_rollout.server --config project/config.yaml

  # for trainers on other machines
  python -m tandem_rollout.server --config project/config.yaml \\
      --trainer.rollout.environment_server.host 0.0.0.0

environment:
  TANDEM__SECTION__KEY           sets a YAML key
  TANDEM_ENVIRONMENT_TOKEN       bearer token of this server, the same for the trainer; not that of the generators
  TANDEM_ENVIRONMENT_TOKEN_FILE  file with the token, instead of TANDEM_ENVIRONMENT_TOKEN

The command line wins over the environment, the environment over config.yaml, and config.yaml over the defaults.

exit codes:
  0  stopped by SIGTERM, or its run is over
  1  failed; starting again may help
  2  a setting or the project is wrong; the message says which
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped or until the run is over, and return the exit code (see `--help`)."""
    end_file = EndFile.from_environment()
    try:
        logs.configure()
        if end_file and end_file.is_over():
            return 0
        known, rest = _parser().parse_known_args(sys.argv[1:] if argv is None else argv)
        path = known.config.absolute()
        settings, sources = load(TrainerSettings, path=path, overrides=parse_overrides(rest))
        if known.check:
            print(format_resolved(settings, sources))
            return 0
        capture_output()
        os.chdir(path.parent)  # imports and relative paths start at the project
        sys.path.insert(0, str(path.parent))
        if end_file:
            end_file.end_with_run()
        with project_in_use():
            asyncio.run(_serve(settings.trainer.rollout, read_environment_token()))
        return 0
    except (ConfigError, UserError) as error:
        logs.report_error(error)
        return 2
    except OSError as error:
        logs.report_error(error)
        return 1


def _parser() -> argparse.ArgumentParser:
    usage = "--config FILE [--check] [--SECTION.KEY VALUE ...]"
    parser = ServiceParser("tandem_rollout.server", usage, _DESCRIPTION, _EPILOG, _list_keys)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE",
                        help="The project's config.yaml. (required)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="Print every setting with its source, and exit.")
    return parser


def _list_keys(parser: argparse.ArgumentParser) -> None:
    """Add the keys of the YAML that this server reads to the help."""
    add_keys(parser, "trainer", TrainerConfig, omit=lambda key: not key.startswith(f"{_PREFIX}environment"))


async def _serve(config: RolloutConfig, token: str | None) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: the port is in use, or others could use the server without a token.
        UserError: the project's tools or environments have an error.
    """
    options = config.environment_server
    if token is None and options.host not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(
            f"{_PREFIX}environment_server.host {options.host} can be reached from other machines, but no token is set. "
            f"Fix: set {ENVIRONMENT_TOKEN_ENV} or {ENVIRONMENT_TOKEN_FILE_ENV} for this server and the trainer, or use "
            "host 127.0.0.1."
        )
    environments = load_environments(config)
    listening = listen(options.host, options.port, f"{_PREFIX}environment_server.port")
    sessions = Sessions(
        environments,
        max_sessions=options.max_sessions,
        idle_timeout_s=options.idle_timeout_s,
        timeout_s=config.tool_timeout_s,
    )
    if isinstance(environments, ClassEnvironments):
        await environments.start()
    watching = asyncio.create_task(sessions.watch())
    server = _Server(
        uvicorn.Config(
            build_app(environments, sessions, token),
            log_level="warning",
            log_config=None,  # through the root logger, in our format
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=options.shutdown_timeout_s,
        )
    )
    try:
        await server.serve(sockets=[listening])
    finally:
        watching.cancel()
        await sessions.close_of()
        await environments.close()


class _Server(uvicorn.Server):
    """Ends normally on a signal. uvicorn would raise it again at its end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


if __name__ == "__main__":
    sys.exit(main())
