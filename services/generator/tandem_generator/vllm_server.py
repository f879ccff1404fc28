"""Run vLLM's own server, unmodified, with Tandem's plug-ins."""

from __future__ import annotations

import os
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import uvloop
import vllm
from huggingface_hub import hf_hub_download
from pydantic import ValidationError
from vllm.entrypoints.cli.serve import run_headless
from vllm.entrypoints.launchers.api_server.entry import run_server
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tandem_protocol.config import ConfigError
from tandem_protocol.config.generator import GeneratorSettings
from tandem_protocol.config.vllm_options import refuse_owned
from tandem_protocol.errors import EngineFailed, TandemError
from tandem_protocol.logs import JSON, LOG_ENV
from tandem_protocol.ports import LOOPBACK_ONLY, listen
from tandem_protocol.problems import summarize
from tandem_protocol.quantization import quantization_problem
from tandem_protocol.store import WeightStore

from .plugin import TandemRoutes
from .vllm_logging import first_failure
from .vllm_routes import MAX_LOGPROBS
from .vllm_worker import EXTENSION
from .volume_engine import BACKEND

_OFFLINE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Environment variables that disable telemetry. Users can override them."""


def serve_vllm(settings: GeneratorSettings, engine_args: Sequence[str]) -> bool:
    """Serve until SIGTERM or SIGINT.

    With `--headless`, this process is a further node of a replica with several nodes (`--nnodes`). It runs only vLLM's
    workers, without routes, until the first node ends.

    Args:
        settings: The generator's settings.
        engine_args: Further words for vLLM's command line.

    Returns:
        False if the server ended without a signal, because its engine died.

    Raises:
        TandemError: The newest version in the weight store cannot be served, or the engine ended while it loaded the
            model.
        ConfigError: The model is quantized, vLLM refuses the model or an option, an option is reserved for Tandem, or
            the port is in use.
    """
    _refuse_quantized(settings)
    args = parse_engine_args(settings, engine_args)
    if args.headless:
        args.api_server_count = 0
        run_headless(args)
        return False
    # vLLM would share the port with another server of the same user. Then each server would get some of the requests.
    listen(settings.generator.host, settings.generator.port, "generator.port").close()
    if args.nnodes == 1 and args.data_parallel_address is None:
        for name, interface in LOOPBACK_ONLY.items():
            os.environ.setdefault(name, interface)
    TandemRoutes.settings = settings
    try:
        with start_errors(settings.shared.model, is_up=lambda: hasattr(TandemRoutes, "switcher")):
            uvloop.run(run_server(args))
    except KeyboardInterrupt:  # SIGTERM before the server was up
        return True
    finally:
        if hasattr(TandemRoutes, "switcher"):
            TandemRoutes.switcher.stored.close()
    WeightStore(settings.shared.weights_dir).lease(settings.generator.replica, ())
    return TandemRoutes.switcher.stopping


@contextmanager
def start_errors(model: str, is_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Convert errors of vLLM's start to errors with a message for the user.

    Args:
        model: The value of `shared.model`.
        is_up: Returns True once the server is up. Errors after that are not converted.

    Raises:
        ConfigError: vLLM does not support the model, or an option does not fit it.
        EngineFailed: The engine ended while it loaded the model. A restart may help.
    """
    try:
        yield
    except (ConfigError, TandemError, OSError):
        raise
    except Exception as error:  # any type: vLLM's and the model's own code run here
        if is_up():
            raise
        if "Engine core initialization failed" in str(error):
            raise EngineFailed(
                f"vLLM {vllm.__version__} cannot load shared.model {model!r} on this machine: "
                f"{first_failure() or 'its log above says why'}. Fix: correct that, or choose another shared.model "
                "(docs/reference/architectures.md)"
            ) from error
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            reason = summarize(error.errors())
        raise ConfigError(
            f"vLLM {vllm.__version__} refuses shared.model {model!r} or an option for it: {reason}. Fix: change that "
            "option, or choose another shared.model (docs/reference/architectures.md)"
        ) from error


def _refuse_quantized(settings: GeneratorSettings) -> None:
    """Refuse a quantized model on the hub before its weights are downloaded."""
    shared = settings.shared
    if Path(shared.model).is_dir():
        return  # checked already
    try:
        config = hf_hub_download(shared.model, "config.json", revision=shared.revision)
    except (OSError, ValueError):
        return  # vLLM reports problems with the model's name or the network
    if problem := quantization_problem(shared.model, Path(config).parent):
        raise ConfigError(problem)


def parse_engine_args(settings: GeneratorSettings, engine_args: Sequence[str]) -> Namespace:
    """Parse all options with vLLM's own parser. Also sets the environment variables that vLLM reads.

    Args:
        settings: The generator's settings.
        engine_args: Further words for vLLM's command line.

    Raises:
        ConfigError: vLLM refuses an option, or the option is reserved for Tandem.
    """
    _set_environment(settings)
    parser = make_arg_parser(_Parser(prog="python -m tandem_generator", add_help=False))
    args: Namespace = parser.parse_args([*_arguments(settings), *engine_args])
    refuse_owned(_named(parser, engine_args))
    try:
        validate_parsed_serve_args(args)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"vLLM refuses its options: {error}") from error
    return args


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM ships no types
    """Raises an error instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"vLLM refuses its options: {message}. `vllm serve --help=all` lists them.")


def _named(parser: FlexibleArgumentParser, engine_args: Sequence[str]) -> dict[str, Any]:
    """Return the options in `engine_args`, name → value. `-asc 2` and `--api-server 2` give the same name."""
    for action in parser._actions:
        action.default = SUPPRESS
    named: dict[str, Any] = vars(parser.parse_args(list(engine_args)))
    return named


def _set_environment(settings: GeneratorSettings) -> None:
    for name, value in {**_OFFLINE, **settings.generator.env}.items():
        os.environ.setdefault(name, value)
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins, TandemRoutes.name]))
    cli_env_setup()


def _arguments(settings: GeneratorSettings) -> list[str]:
    """Return vLLM's command line for the configured options."""
    shared, config = settings.shared, settings.generator
    values = {
        "model": shared.model,
        "revision": shared.revision,
        "host": config.host,
        "port": config.port,
        "tensor-parallel-size": config.tensor_parallel_size,
        "data-parallel-size": config.data_parallel_size,
        "gpu-memory-utilization": config.gpu_memory_utilization,
        "dtype": config.dtype,
        "max-model-len": config.max_model_len,
        # Must be shorter than the supervisor's grace period. With 0, vLLM hangs on SIGTERM while requests run.
        "shutdown-timeout": config.shutdown_timeout_s,
        # The served version is kept in one server process.
        "api-server-count": 1,
        "uvicorn-log-level": "warning",  # no line per request
        "logprobs-mode": "processed_logprobs",
        "max-logprobs": MAX_LOGPROBS,
        "weight-transfer-config": f'{{"backend": "{BACKEND}"}}',
        "worker-extension-cls": EXTENSION,
        "middleware": "tandem_generator.auth.BearerAuth",
    }
    flags = {
        "trust-remote-code": shared.trust_remote_code,
        "enforce-eager": config.enforce_eager,
        "enable-prefix-caching": config.enable_prefix_caching,
        "use-tqdm-on-load": False if os.environ.get(LOG_ENV) == JSON else None,  # a progress bar is not JSON
    }
    words = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
    return words + [f"--{'' if on else 'no-'}{name}" for name, on in flags.items() if on is not None]
