"""Bearer-token authentication for all routes of the server, Tandem's and vLLM's."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tandem_protocol.config import TOKEN_ENV, TOKEN_FILE_ENV, is_authorized, read_token
from tandem_protocol.errors import Unauthorized
from tandem_protocol.routes import OPEN


class BearerAuth:
    """ASGI middleware that checks the bearer token. Without a configured token, every request passes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        token = read_token()
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._token is None or scope["path"] in OPEN:
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
        await JSONResponse(error.body.model_dump(), status_code=error.status)(scope, receive, send)
