"""`python -m tandem_generator`: start the mock engine's server, or vLLM's server with Tandem's plug-ins."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem_protocol import logs
from tandem_protocol.config import TOKEN_ENV, TOKEN_FILE_ENV, ConfigError, format_resolved, read_token
from tandem_protocol.config.generator import GeneratorSettings
from tandem_protocol.end_file import EndFile
from tandem_protocol.errors import TandemError
from tandem_protocol.folders import require_readable
from tandem_protocol.handover import Failure
from tandem_protocol.lock import project_in_use
from tandem_protocol.memory import oom_kills, why_killed
from tandem_protocol.model_directory import check_model_directory
from tandem_protocol.problems import one_line
from tandem_protocol.processes import USER_ERROR
from tandem_protocol.quantization import quantization_problem
from tandem_protocol.store import WeightStore

from .engines.mock import MockEngine
from .options import Options, parse
from .server import serve
from .vllm_logging import configure_vllm_logging
from .weight_switcher import WeightSwitcher

log = logging.getLogger("tandem_generator")  # `python -m` calls this module __main__

RESTART_ME = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped. Returns 0 after SIGTERM or with its run, 2 for a user error, 1 if a restart may help."""
    end_file = EndFile.from_environment()
    options: Options | None = None
    try:
        logs.configure()
        if end_file and not end_file.should_start():
            return 0
        options = parse(sys.argv[1:] if argv is None else argv)
        if options.project:
            os.chdir(options.project)
        token = read_token()  # reports a bad token now instead of at the first request
        if options.check:
            print(format_resolved(options.settings, options.sources))
            return 0
        _check(options.settings, token)
        if end_file:
            end_file.end_with_run()
        with project_in_use():
            if options.settings.generator.engine == "mock":
                return asyncio.run(_serve_mock(options.settings))
            return _serve_vllm(options)
    except (ConfigError, TandemError, OSError) as error:
        logs.report_error(error)
        if oom_kills():
            logs.report_error(why_killed("TANDEM_GENERATOR_MEMORY", "lower generator.max_model_len"))
        is_user_error = isinstance(error, ConfigError) or (isinstance(error, TandemError) and not error.retryable)
        status = USER_ERROR if is_user_error else RESTART_ME
        return status if end_file is None else _end_run(end_file, Failure(status, str(error)), options)


def _end_run(end_file: EndFile, failure: Failure, options: Options | None) -> int:
    """Hand a failure to the trainer if a restart would not help.

    Returns:
        The exit status: 0 if the run has ended with the failure, so that nothing is started again.
    """
    try:
        if failure.status == RESTART_ME and not (options and end_file.starts_fail(_lease(options.settings))):
            return RESTART_ME
        return 0 if end_file.end_run(failure) else failure.status
    except OSError as problem:
        log.warning("the trainer cannot be informed: %s", problem)
        return failure.status


def _lease(settings: GeneratorSettings) -> Path:
    return WeightStore(settings.shared.weights_dir).lease_file(settings.generator.replica)


def _check(settings: GeneratorSettings, token: str | None) -> None:
    """Find user errors before an engine is started.

    Raises:
        ConfigError: describes the first one.
    """
    shared, config = settings.shared, settings.generator
    needs_weights = config.engine == "vllm" and "load_format" not in config.vllm
    if problem := quantization_problem(shared.model, Path(shared.model)):
        raise ConfigError(problem)
    check_model_directory(shared.model, needs_weights=needs_weights)
    if method := config.vllm.get("quantization"):
        raise ConfigError(
            f"generator.vllm.quantization is {method}, but a generator switches unquantized weights only. Fix: leave "
            "it out."
        )
    require_readable(shared.weights_dir, "shared.weights_dir")
    if token is None and config.host not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(
            f"generator.host {config.host} can be reached from other machines, but no token is set. Fix: set "
            f"{TOKEN_ENV} or {TOKEN_FILE_ENV} for both services, or use host 127.0.0.1."
        )


def _serve_vllm(options: Options) -> int:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "got generator.engine vllm, but vLLM is not installed here. Fix: install "
            "docker/requirements/generator-cpu.txt (or -cuda.txt), or use --engine mock."
        )
    configure_vllm_logging(options.settings.generator.env)
    log.info("starting vLLM with %s; this takes a minute or more", options.settings.shared.model)
    from .vllm_server import serve_vllm  # the image of the mock engine has no vLLM

    return 0 if serve_vllm(options.settings, options.engine_args) else RESTART_ME


async def _serve_mock(settings: GeneratorSettings) -> int:
    shared, config = settings.shared, settings.generator
    try:
        engine = MockEngine(shared.model, config.mock, config.max_model_len)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"shared.model: {shared.model} cannot be read: {one_line(error)}. Expected a folder with the files "
            "of a Hugging Face model. Fix: restore its files, or name another folder."
        ) from error
    switcher = WeightSwitcher(engine, WeightStore(shared.weights_dir), config)
    await serve(switcher, shared.model, config.host, config.port, config.shutdown_timeout_s)
    return RESTART_ME if switcher.failed.is_set() else 0


if __name__ == "__main__":
    sys.exit(main())
