"""Server of the mock engine, with the same routes, authentication and metrics as vLLM's server with the plug-in."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tandem_protocol import routes as paths
from tandem_protocol.ports import listen

from .auth import BearerAuth
from .mock_completions import build_mock_completions
from .routes import build_router
from .vllm_routes import build_vllm_routes
from .weight_switcher import WeightSwitcher


def build_app(switcher: WeightSwitcher, model: str) -> FastAPI:
    """Create the app. The caller starts and closes `switcher`."""
    app = FastAPI(title="Tandem generator")
    app.include_router(build_router(switcher, model))
    app.include_router(build_vllm_routes(switcher, model))
    app.include_router(build_mock_completions(switcher, model))
    app.add_api_route(paths.METRICS, _metrics)
    app.add_middleware(BearerAuth)
    return app


async def _metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


class _Server(uvicorn.Server):
    """Leaves signals to `serve`. uvicorn would raise them again at its end, before the engine is closed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(switcher: WeightSwitcher, model: str, host: str, port: int, shutdown_timeout_s: int) -> None:
    """Serve until SIGTERM or SIGINT, or until the switcher has failed.

    Args:
        switcher: Serves the requests. It is started and closed here.
        model: The value of `shared.model`, for `GET /info`.
        host: Address to listen on.
        port: Port to listen on.
        shutdown_timeout_s: How long running requests may take to finish after a signal, in seconds.

    Raises:
        TandemError: The switcher could not start.
        ConfigError: The port is in use.
    """
    config = uvicorn.Config(
        build_app(switcher, model),
        host=host,
        port=port,
        log_level="warning",
        log_config=None,  # through the root logger, in our format
        timeout_graceful_shutdown=shutdown_timeout_s,
    )
    server = _Server(config)
    listening = listen(host, port, "generator.port")
    await switcher.start()
    end_on_signal(switcher, server)
    failed = asyncio.create_task(end_when_failed(switcher, server))
    try:
        await server.serve(sockets=[listening])
    finally:
        failed.cancel()
        await switcher.close()


def end_on_signal(switcher: WeightSwitcher, server: uvicorn.Server) -> None:
    """On SIGTERM or SIGINT, refuse new requests, let running ones finish within the server's timeout, and exit."""

    def stop() -> None:
        switcher.stop()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)


async def end_when_failed(switcher: WeightSwitcher, server: uvicorn.Server) -> None:
    """Stop the server when the switcher has failed. Running requests are dropped, because the engine stays paused."""
    await switcher.failed.wait()
    logging.getLogger("uvicorn.error").addFilter(_is_not_a_cancellation)
    server.should_exit = server.force_exit = True


def _is_not_a_cancellation(record: logging.LogRecord) -> bool:
    """False for the tracebacks of what ends with the server: requests, and the wait for its shutdown."""
    is_raised = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not is_raised and not record.getMessage().rstrip().endswith("CancelledError")
