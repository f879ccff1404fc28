"""The endpoint that agents call: an OpenAI-compatible server in the rollout process, which records what is sampled.

Each episode has a session with a URL and a key of its own, so that calls of several episodes are kept apart. For
example, an agent built with the `openai` library:

    async def run(row, client):
        answer = await client.openai().chat.completions.create(model=client.model, messages=row["prompt"])
        return float(row["answer"] in answer.choices[0].message.content)
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tandem_protocol.problems import summarize

from .sessions import Answer, CallRefused, ChatCall, Session

CHAT = "/s/{session}/v1/chat/completions"
MODELS = "/s/{session}/v1/models"
RETRY_HEADER = "x-stainless-retry-count"
"""The `openai` libraries send how often a request has been tried before."""
_STOP_TIMEOUT_S = 10.0


class Proxy:
    """Answers the calls of all sessions."""

    def __init__(self, model: str) -> None:
        """
        Args:
            model: the name of the policy in answers. Agents may ask for any name.
        """
        self.model = model
        self.url = ""
        """Where it listens. Empty until `serve`."""
        self.app = Starlette(routes=[Route(CHAT, self._chat, methods=["POST"]), Route(MODELS, self._models)])
        self._sessions: dict[str, Session] = {}
        self._asking: dict[str, set[asyncio.Task[Answer]]] = {}

    @contextmanager
    def session(self, session: Session) -> Iterator[str]:
        """Answer calls of a session. Yields the path of its base URL."""
        name = secrets.token_hex(16)
        self._sessions[name] = session
        try:
            yield f"/s/{name}/v1"
        finally:
            del self._sessions[name]
            for asking in self._asking.pop(name, set()):  # calls that the agent has not waited for
                asking.cancel()

    @asynccontextmanager
    async def serve(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[None]:
        """Listen, on any free port by default."""
        listener = socket.create_server((host, port))
        self.url = f"http://{host}:{listener.getsockname()[1]}"
        server = _Server(uvicorn.Config(self.app, log_config=None, access_log=False, lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.should_exit = server.force_exit = True
            await asyncio.wait({serving}, timeout=_STOP_TIMEOUT_S)
            listener.close()

    async def _models(self, request: Request) -> Response:
        if isinstance(found := self._find(request), Response):
            return found
        return JSONResponse({"object": "list", "data": [{"id": self.model, "object": "model", "owned_by": "tandem"}]})

    async def _chat(self, request: Request) -> Response:
        body = await request.body()
        session = self._find(request)  # after the body, because the episode may end before its last byte arrives
        if isinstance(session, Response):
            return session
        try:
            call = ChatCall.model_validate_json(body)
        except ValidationError as error:
            return _error(400, summarize(error.errors()), "invalid_request")
        identity = hashlib.blake2b(body).hexdigest()
        is_retry = request.headers.get(RETRY_HEADER, "0") != "0"
        answer = session.answered(identity, is_retry=is_retry)
        if answer is None:
            try:
                answer = await self._unless_gone(request, asyncio.create_task(session.ask(identity, call)))
            except CallRefused as refused:
                return _error(400, str(refused), refused.code)
            except Exception as error:  # the session keeps it; the run ends with it
                return _error(500, f"{type(error).__name__}: {error}", "sampling_failed")
        if answer is None or await request.is_disconnected():  # if the client tries again, it gets this answer
            return Response(status_code=499)
        session.record(answer)
        if call.stream:
            return StreamingResponse(_stream(answer, self.model), media_type="text/event-stream")
        return JSONResponse(answer.body(self.model))

    def _find(self, request: Request) -> Session | Response:
        session = self._sessions.get(request.path_params["session"])
        if session is None:
            return _error(404, "there is no such session: the episode may be over", "no_session")
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(key.encode(), session.key.encode()):
            return _error(401, "got a wrong API key, expected the session's", "invalid_api_key")
        return session

    async def _unless_gone(self, request: Request, asking: asyncio.Task[Answer]) -> Answer | None:
        """Return the answer. If the client disconnects, or the episode ends, sampling is cancelled: return None."""
        of_session = self._asking.setdefault(request.path_params["session"], set())
        of_session.add(asking)
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() and not asking.cancelled() else None
        finally:
            gone.cancel()
            asking.cancel()
            of_session.discard(asking)


class _Server(uvicorn.Server):
    """A server that leaves the signals to the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(status: int, message: str, code: str) -> Response:
    """An error in the shape of the OpenAI API. The client must not retry: `Session` has retried what can be."""
    body = {"error": {"message": message, "type": code, "code": code, "param": None}}
    return JSONResponse(body, status, headers={"x-should-retry": "false"})


async def _stream(answer: Answer, model: str) -> AsyncIterator[str]:
    """The answer as events. It is sampled already, so its text is one event: smaller ones would not come earlier."""
    body = answer.body(model)
    (choice,) = body.pop("choices")
    usage = body.pop("usage")
    chunk = {**body, "object": "chat.completion.chunk"}
    message = choice["message"]
    if calls := message.get("tool_calls"):
        message = {**message, "tool_calls": [{**call, "index": index} for index, call in enumerate(calls)]}
    for delta, reason in ((message, None), ({}, choice["finish_reason"])):
        yield _event({**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]})
    if (answer.call.stream_options or {}).get("include_usage"):
        yield _event({**chunk, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
