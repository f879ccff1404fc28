"""Authentication for all routes of the server, Tandem's and vLLM's, and the refusal of routes that change weights."""

from __future__ import annotations

from starlette._utils import get_route_path  # the path by which the router finds a route: without `root_path`
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tandem_protocol.config import TOKEN_ENV, TOKEN_FILE_ENV, is_authorized, read_token
from tandem_protocol.errors import BadRequest, TandemError, Unauthorized
from tandem_protocol.routes import OPEN

ROUND_THE_SWITCHER = frozenset({
    *("/pause", "/resume", "/sleep", "/wake_up", "/release_kv_cache_memory", "/collective_rpc"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
    *("/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"),
    *("/weight_checker", "/abort_requests", "/scale_elastic_ep", "/fault_tolerance/apply"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"),
    *("/init_communicator", "/update_named_param", "/close_communicator"),
})  # fmt: skip
"""Routes of vLLM, most of them of its development mode, and of TRL's former server. They would change weights, stop the
engine or end the requests of others without the `WeightSwitcher`. Then the generator would report a version that it
does not serve, or be ready and not answer."""


class BearerAuth:
    """ASGI middleware that checks the token. Without a configured token, every request passes.

    It also refuses `ROUND_THE_SWITCHER`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = _refusing(app)
        token = read_token()
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._token is None or get_route_path(scope) in OPEN:
            return await self._app(scope, receive, send)
        got = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if is_authorized(got.decode("latin-1"), self._token):
            return await self._app(scope, receive, send)
        found = "another token" if got else "no token"
        error = Unauthorized(
            f"got {found}, expected the generator's token as 'Authorization: Bearer …'. "
            f"Fix: give both services the same {TOKEN_ENV} or {TOKEN_FILE_ENV}."
        )
        if scope["type"] == "websocket":
            await receive()
            return await send({"type": "websocket.close", "code": 1008, "reason": error.code})
        await _answer(error)(scope, receive, send)


def _refusing(app: ASGIApp) -> ASGIApp:
    """Return `app` without the routes in `ROUND_THE_SWITCHER`."""

    async def refuse_or_call(scope: Scope, receive: Receive, send: Send) -> None:
        path = get_route_path(scope).rstrip("/") if scope["type"] == "http" else ""
        if path not in ROUND_THE_SWITCHER and not path.startswith("/adapters/"):
            return await app(scope, receive, send)
        error = BadRequest(
            f"got {scope['method']} {path}, which changes the engine without Tandem's record of the served version; "
            "expected PUT /weights/{version}, after the weights were written to the weight store. Fix: start a TRL "
            "script with `python -m tandem_trainer.trl train.py`, which does both."
        )
        await _answer(error)(scope, receive, send)

    return refuse_or_call


def _answer(error: TandemError) -> JSONResponse:
    return JSONResponse(error.body.model_dump(), status_code=error.status)
