"""The mock's own server: the same router, authentication and metrics that the plug-in mounts in vLLM's server."""

from __future__ import annotations

import asyncio

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tandem_protocol import routes as paths

from .auth import BearerAuth
from .policy import Policy
from .routes import build_router


def build_app(policy: Policy, model: str) -> FastAPI:
    """The app over a policy that somebody else starts and closes."""
    app = FastAPI(title="Tandem generator")
    app.include_router(build_router(policy, model))
    app.add_api_route(paths.METRICS, _metrics)
    app.add_middleware(BearerAuth)
    return app


async def _metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def serve(policy: Policy, model: str, host: str, port: int, shutdown_timeout_s: int) -> None:
    """Serve until SIGTERM or SIGINT, or until the policy has failed.

    Raises:
        TandemError: the policy could not start.
    """
    config = uvicorn.Config(
        build_app(policy, model),
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=shutdown_timeout_s,
    )
    server = uvicorn.Server(config)
    await policy.start()
    try:
        serving, failed = asyncio.create_task(server.serve()), asyncio.create_task(policy.failed.wait())
        await asyncio.wait({serving, failed}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        failed.cancel()
        await serving
    finally:
        await policy.close()
