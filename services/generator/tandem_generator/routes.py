"""HTTP routes of the generator. The mock's server and vLLM's server use the same router."""

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from tandem_protocol import routes as paths
from tandem_protocol.errors import BadRequest, TandemError
from tandem_protocol.messages import (
    OLDEST_PROTOCOL_VERSION,
    PROTOCOL_VERSION,
    AwaitedWeights,
    Group,
    Info,
    Parameters,
    Progress,
    Readiness,
    RolloutLine,
    RolloutRequest,
    ServedWeights,
    SetWeights,
)
from tandem_protocol.problems import summarize
from tandem_protocol.repeats import Repeats
from tandem_protocol.version import Version

from .progress import TokenCount, with_heartbeats
from .weight_switcher import WeightSwitcher

repeats = Repeats(logging.getLogger(__name__))


class _ErrorBodyRoute(APIRoute):
    """Answers every error with an `ErrorBody`, independent of the app's error handlers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except TandemError as error:
                return _error(error)
            except RequestValidationError as error:
                return _error(BadRequest(_problem(error)))
            except HTTPException as error:
                return _error(BadRequest(f"{error.detail}; expected JSON in UTF-8"))
            except Exception as error:
                what = f"{request.method} {request.url.path}"
                kind = type(error).__name__
                repeats.say(logging.ERROR, f"{what} {kind}", f"{what} failed: {kind}: {error}", traceback=True)
                return _error(TandemError(f"{type(error).__name__} in the generator. See its log."))

        return answer


def _error(error: TandemError) -> JSONResponse:
    return JSONResponse(error.body.model_dump(), status_code=error.status)


def _problem(error: RequestValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":  # raised by FastAPI, with the complete body as input
        return f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
    return summarize(error.errors())


def build_router(switcher: WeightSwitcher, model: str) -> APIRouter:
    """Return a router with all routes of the wire contract except `/metrics`, which the server adds.

    Args:
        switcher: Serves the requests.
        model: The value of `shared.model`, for `GET /info`.
    """
    router = APIRouter(route_class=_ErrorBodyRoute, tags=["tandem"])

    @router.get(paths.HEALTHZ)
    async def healthz() -> dict[str, str]:
        """Report that the process is alive."""
        return {"status": "alive"}

    @router.get(paths.READYZ)
    async def readyz(response: Response) -> Readiness:
        """Report whether rollout requests are answered. Status 503 with the reason if not."""
        reason = switcher.not_ready
        response.status_code = 503 if reason else 200
        return Readiness(ready=reason is None, reason=reason or f"serving version {switcher.version}")

    @router.get(paths.INFO)
    async def info(
        protocol: Annotated[int, Query(ge=OLDEST_PROTOCOL_VERSION)] = OLDEST_PROTOCOL_VERSION,
    ) -> Info:
        """Describe this generator and the version that it serves. `protocol`: the client's newest version."""
        return _info(switcher, model, min(protocol, PROTOCOL_VERSION))

    @router.get(paths.PARAMETERS)
    async def parameters() -> Parameters:
        """Return names and shapes of the model's parameters."""
        return Parameters(shapes=dict(switcher.engine.facts.shapes or {}))

    @router.get(paths.WEIGHTS)
    async def get_weights(awaited: Annotated[AwaitedWeights, Query()]) -> ServedWeights:
        """Return the version that is served, or wait until `at_least` is."""
        if awaited.at_least is None:
            return switcher.served
        return await switcher.wait_for(_version(awaited.at_least), awaited.wait_s)

    @router.put(paths.SET_WEIGHTS)
    async def set_weights(version: str, body: SetWeights, response: Response) -> ServedWeights:
        """Switch to a version. The answer is sent when the version is served."""
        served = await switcher.set(_version(version), body)
        if served.timings:
            response.headers["Server-Timing"] = served.timings.header
        return served

    @router.post(paths.ROLLOUTS, response_model=RolloutLine)
    async def rollouts(request: RolloutRequest) -> StreamingResponse:
        """Sample completions. The answer is NDJSON with one finished group per line."""
        count = TokenCount()
        groups = switcher.rollouts(request, count.add)
        lines = _lines(with_heartbeats(groups, count, request.heartbeat_s))
        return StreamingResponse(lines, media_type="application/x-ndjson")

    return router


def _version(text: str) -> Version:
    try:
        return Version.parse(text)
    except ValueError as error:
        raise BadRequest(str(error)) from error


def _info(switcher: WeightSwitcher, model: str, protocol: int) -> Info:
    facts = switcher.engine.facts
    return Info(
        protocol=protocol,
        generator_id=switcher.generator_id,
        engine=facts.engine,
        engine_version=facts.engine_version,
        model=model,
        fingerprint=facts.fingerprint,
        version=switcher.version,
        devices=facts.devices,
        world_size=facts.world_size,
        max_model_len=facts.max_model_len,
        max_num_seqs=facts.max_num_seqs,
        dtype=facts.dtype,
        kinds=tuple(sorted(facts.kinds)),
        max_lora_rank=facts.max_lora_rank,
        lora_heads=facts.lora_heads,
    )


async def _lines(parts: AsyncGenerator[Group | Progress, None]) -> AsyncGenerator[str, None]:
    try:
        async with contextlib.aclosing(parts):
            async for part in parts:
                is_group = isinstance(part, Group)
                yield _line(RolloutLine(group=part) if is_group else RolloutLine(progress=part))
    except TandemError as error:
        yield _line(RolloutLine(error=error.body))


def _line(line: RolloutLine) -> str:
    return line.model_dump_json(exclude_none=True) + "\n"
