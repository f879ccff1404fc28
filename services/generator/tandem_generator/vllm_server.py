"""Start vLLM's own server, unmodified, with our plug-ins, and tell by the exit status how it ended."""

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
from tandem_protocol.errors import EngineFailed, TandemError
from tandem_protocol.ports import listen
from tandem_protocol.problems import summarize
from tandem_protocol.quantization import quantization_problem
from tandem_protocol.store import WeightStore

from .config import Settings
from .engine_options import refuse_owned
from .plugin import TandemRoutes
from .volume_engine import BACKEND

_OFFLINE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Nothing phones home unless asked to."""


def serve_vllm(settings: Settings, engine_args: Sequence[str]) -> bool:
    """Serve until SIGTERM or SIGINT. Returns False when the server ended by itself, because its engine died.

    With `--headless` this is a further node of a replica (`--nnodes`): vLLM's workers alone, for as long as the first
    node, which has the routes, is there.

    Raises:
        TandemError: the weight store's newest version cannot be served, or the engine ended while it loaded the model.
        ConfigError: the model is quantized, vLLM refuses it or an option, or the option is one of those that are
            Tandem's; the port is in use.
    """
    _refuse_quantized(settings)
    args = parse_engine_args(settings, engine_args)
    if args.headless:
        args.api_server_count = 0
        run_headless(args)
        return False
    # vLLM shares a port with another server of the same user, so that either would get a part of the requests.
    listen(settings.generator.host, settings.generator.port, "generator.port").close()
    TandemRoutes.settings = settings
    try:
        with start_errors(settings.shared.model, is_up=lambda: hasattr(TandemRoutes, "switcher")):
            uvloop.run(run_server(args))
    except KeyboardInterrupt:  # SIGTERM before the server was up
        return True
    WeightStore(settings.shared.weights_dir).lease(settings.generator.replica, ())
    return TandemRoutes.switcher.stopping


@contextmanager
def start_errors(model: str, is_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Say in a message what keeps vLLM from starting with `model`; afterwards (`is_up`) errors pass as they are.

    Raises:
        ConfigError: vLLM does not know the model, or an option does not fit it.
        EngineFailed: the engine ended while it loaded the model; a restart may help.
    """
    try:
        yield
    except (ConfigError, TandemError, OSError):
        raise
    except Exception as error:  # of any kind: vLLM's and the model's own code run here
        if is_up():
            raise
        if "Engine core initialization failed" in str(error):
            raise EngineFailed(
                f"vLLM {vllm.__version__} cannot load shared.model {model!r} on this machine; its log above says why. "
                "Fix: what the log names, or choose another shared.model (docs/reference/architectures.md)"
            ) from error
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            reason = summarize(error.errors())
        raise ConfigError(
            f"vLLM {vllm.__version__} refuses shared.model {model!r} or an option for it: {reason}. Fix: change that "
            "option, or choose another shared.model (docs/reference/architectures.md)"
        ) from error


def _refuse_quantized(settings: Settings) -> None:
    """Before the weights of a model on the hub are downloaded."""
    shared = settings.shared
    if Path(shared.model).is_dir():
        return  # checked already
    try:
        config = hf_hub_download(shared.model, "config.json", revision=shared.revision)
    except (OSError, ValueError):
        return  # vLLM says what is wrong with the model's name or the network
    if problem := quantization_problem(shared.model, Path(config).parent):
        raise ConfigError(problem)


def parse_engine_args(settings: Settings, engine_args: Sequence[str]) -> Namespace:
    """vLLM's own reading of our options and of the rest of the command line; sets the environment that vLLM reads.

    Raises:
        ConfigError: vLLM refuses an option, or it is one of those that are Tandem's.
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
    """Raises where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"vLLM refuses its options: {message}. `vllm serve --help=all` lists them.")


def _named(parser: FlexibleArgumentParser, engine_args: Sequence[str]) -> dict[str, Any]:
    """The options that `engine_args` name, however they are written: `-asc 2` and `--api-server 2` set one option."""
    for action in parser._actions:
        action.default = SUPPRESS
    named: dict[str, Any] = vars(parser.parse_args(list(engine_args)))
    return named


def _set_environment(settings: Settings) -> None:
    for name, value in {**_OFFLINE, **settings.generator.env}.items():
        os.environ.setdefault(name, value)
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins, TandemRoutes.name]))
    cli_env_setup()


def _arguments(settings: Settings) -> list[str]:
    """vLLM's command line for the options that the configuration names."""
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
        # Below the supervisor's own grace; with 0, vLLM hangs on SIGTERM while requests run.
        "shutdown-timeout": config.shutdown_timeout_s,
        # One server process, because it is where the policy's state lives.
        "api-server-count": 1,
        "logprobs-mode": "processed_logprobs",
        "weight-transfer-config": f'{{"backend": "{BACKEND}"}}',
        "middleware": "tandem_generator.auth.BearerAuth",
    }
    flags = {
        "trust-remote-code": shared.trust_remote_code,
        "enforce-eager": config.enforce_eager,
        "enable-prefix-caching": config.enable_prefix_caching,
    }
    words = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
    return words + [f"--{'' if on else 'no-'}{name}" for name, on in flags.items() if on is not None]
