"""Start a generator: options → the mock's own server, or vLLM's server with our plug-ins."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence

from tandem_protocol.config import ConfigError, format_resolved, read_token
from tandem_protocol.errors import TandemError
from tandem_protocol.store import WeightStore

from .config import Settings
from .engines.mock import MockEngine
from .options import Options, parse
from .policy import Policy
from .server import serve

USER_ERROR = 2
RESTART_ME = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run until stopped. Returns 0 after SIGTERM, 2 for a mistake in the options, 1 when a restart may help."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        read_token()  # a bad token is told now, not by the first request
        if options.project:
            os.chdir(options.project)
        if options.check:
            print(format_resolved(options.settings, options.sources))
            return 0
        if options.settings.generator.engine == "mock":
            return asyncio.run(_serve_mock(options.settings))
        return _serve_vllm(options)
    except (ConfigError, TandemError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def _serve_vllm(options: Options) -> int:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "got generator.engine vllm, but vLLM is not installed here; install docker/requirements/generator-cpu.txt "
            "(or -cuda), or use --engine mock"
        )
    from .launch import serve_vllm  # the mock's image has no vLLM

    return 0 if serve_vllm(options.settings, options.engine_args) else RESTART_ME


async def _serve_mock(settings: Settings) -> int:
    shared, config = settings.shared, settings.generator
    engine = MockEngine(shared.model, config.mock, config.max_model_len)
    policy = Policy(engine, WeightStore(shared.weights_dir), config)
    await serve(policy, shared.model, config.host, config.port, config.shutdown_timeout_s)
    return RESTART_ME if policy.failed.is_set() else 0


if __name__ == "__main__":
    sys.exit(main())
