"""HTTP routes of an environment server."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from tandem_protocol.config import ENVIRONMENT_TOKEN_ENV, ENVIRONMENT_TOKEN_FILE_ENV, is_authorized
from tandem_protocol.errors import BadRequest, TandemError, Unauthorized
from tandem_protocol.messages import Message
from tandem_protocol.problems import summarize

from . import wire
from .base import Environments
from .served import Sessions

_NO_CONTENT = 204


def build_app(environments: Environments, sessions: Sessions, token: str | None) -> FastAPI:
    """Create the app. The caller starts and closes `environments` and `sessions`.

    Args:
        token: what a request must send. None: every request passes.
    """
    app = FastAPI(title="Tandem environment", openapi_url=None)
    app.include_router(_routes(environments, sessions), dependencies=[Depends(_authorization(token))])
    app.add_api_route(wire.HEALTHZ, _healthz)
    app.add_exception_handler(TandemError, _error)
    app.add_exception_handler(RequestValidationError, _error)
    return app


async def _healthz() -> dict[str, str]:
    return {"status": "alive"}


def _routes(environments: Environments, sessions: Sessions) -> APIRouter:
    router = APIRouter()

    @router.get(wire.ENVIRONMENT)
    async def environment() -> wire.EnvironmentInfo:
        return wire.EnvironmentInfo(
            protocol=wire.PROTOCOL_VERSION,
            schemas=tuple(environments.schemas),
            answers_in_text=environments.answers_in_text,
            without_rewards=tuple(getattr(environments, "without_rewards", ())),
            max_sessions=sessions.max_sessions,
        )

    @router.put(wire.SESSION)
    async def open_session(session: str, request: wire.OpenSession) -> Response:
        return _json(await sessions.open(session, request))

    @router.put(wire.STEP)
    async def step(session: str, number: int, request: wire.TakeStep) -> Response:
        return _json(await sessions.step(session, number, request))

    @router.get(wire.REWARDS)
    async def rewards(session: str) -> Response:
        return _json(await sessions.rewards(session))

    @router.delete(wire.SESSION, status_code=_NO_CONTENT)
    async def close(session: str, failed: bool = False) -> None:
        await sessions.close(session, failed=failed)

    @router.delete(wire.SESSIONS, status_code=_NO_CONTENT)
    async def close_of(owner: Annotated[str, Query(min_length=1)]) -> None:
        await sessions.close_of(owner)

    return router


def _json(message: Message) -> Response:
    """Answer with pydantic's own JSON: FastAPI's cannot write NaN."""
    return Response(message.model_dump_json(), media_type="application/json")


def _authorization(token: str | None) -> Callable[[str], Awaitable[None]]:
    async def check(authorization: Annotated[str, Header()] = "") -> None:
        if token is None or is_authorized(authorization, token):
            return
        raise Unauthorized(
            f"got {'another token' if authorization else 'no token'}, expected the environment's token as "
            f"'Authorization: Bearer …'. Fix: give both services the same {ENVIRONMENT_TOKEN_ENV} or "
            f"{ENVIRONMENT_TOKEN_FILE_ENV}."
        )

    return check


async def _error(request: Request, error: Exception) -> Response:
    del request
    if isinstance(error, RequestValidationError):
        error = BadRequest(summarize(error.errors()))
    assert isinstance(error, TandemError), "the app has handlers for these two"
    return JSONResponse(error.body.model_dump(), status_code=error.status)
