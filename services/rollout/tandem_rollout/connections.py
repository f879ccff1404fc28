"""HTTP connections for thousands of requests at the same time.

The pool of an httpx client compares every request with every connection. With 256 requests in flight, a request takes
12 ms of CPU; with 2,000 it takes 100 ms. Here each connection is an httpx transport of its own, and a request takes the
one that was used last, which needs no search.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import httpx

KEEP_ALIVE_S = 4.0
"""How long an unused connection is kept. Generators close theirs after five seconds."""
DEAD_AFTER_S = 30
"""A host that acknowledges nothing for so long is gone: without power, or cut off from the network."""
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_AFTER_S // 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_AFTER_S // 6),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER_S * 1000),
)
"""Has the kernel ask an idle host whether it is there, also while a generator samples and sends nothing."""
_OTHER_FILES = 256
"""Open files that a process needs besides connections."""
_MOST_FILES = 65_536


class Connections(httpx.AsyncBaseTransport):
    """A transport that opens as many connections as there are requests, and uses them again.

    A server may close an unused connection when the next request is already on its way. That request is sent once more,
    on a new connection: all requests of the contract can be repeated.

    If the process may not open more connections, a request waits until another one has ended. Requests for rollouts
    last for minutes, so they wait for each other only: a switch of versions has a place of its own.
    """

    def __init__(
        self,
        *,
        most: int | None = None,
        keep_alive_s: float = KEEP_ALIVE_S,
        socket_options: Sequence[tuple[int, int, int]] = KEEPALIVE,
    ) -> None:
        """
        Args:
            most: largest number of connections for POST requests, and for all others. None: half of the files that the
                process may open.
        """
        most = most or _most_connections()
        self._places = {is_post: asyncio.Semaphore(most) for is_post in (True, False)}
        self._keep_alive_s = keep_alive_s
        # Certificates are read once, and not for each connection.
        self._options: dict[str, Any] = {"verify": httpx.create_ssl_context(trust_env=False), "trust_env": False}
        one = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=keep_alive_s)
        self._options |= {"limits": one, "socket_options": list(socket_options)}
        self._idle: dict[tuple[str, str, int | None], deque[_Idle]] = {}
        """Origin → its unused connections. The one that was used last is at the end."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request. The connection is free again when the response is closed."""
        place = self._places[request.method == "POST"]
        await place.acquire()
        origin = (request.url.scheme, request.url.host, request.url.port)
        idle = self._idle.setdefault(origin, deque())
        connection = idle.pop().connection if idle else None
        try:
            response = await _answer_unless_broken(connection, request) if connection else None
            if connection is None or response is None:
                connection = httpx.AsyncHTTPTransport(**self._options)
                response = await connection.handle_async_request(request)
        except BaseException:
            place.release()
            if connection is not None:
                await connection.aclose()
            raise
        response.stream = _Body(self, response.stream, connection, place, idle)
        return response

    async def give_back(self, connection: httpx.AsyncHTTPTransport, idle: deque[_Idle]) -> None:
        """Keep a connection for the next request, and close those that have not been used for long."""
        now_s = time.monotonic()
        idle.append(_Idle(connection, now_s))
        for others in list(self._idle.values()):
            while others and others[0].since_s < now_s - self._keep_alive_s:
                await others.popleft().connection.aclose()

    async def aclose(self) -> None:
        """Close the unused connections."""
        for idle in self._idle.values():
            while idle:
                await idle.pop().connection.aclose()


class _Idle(NamedTuple):
    connection: httpx.AsyncHTTPTransport
    since_s: float
    """On the monotonic clock."""


class _Body(httpx.AsyncByteStream):
    """The body of a response, which gives its connection back when it is closed."""

    def __init__(
        self,
        connections: Connections,
        body: Any,
        connection: httpx.AsyncHTTPTransport,
        place: asyncio.Semaphore,
        idle: deque[_Idle],
    ) -> None:
        self._connections = connections
        self._body = body
        self._connection: httpx.AsyncHTTPTransport | None = connection
        self._place = place
        self._idle = idle

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._body:
            yield part

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            await self._body.aclose()
        except BaseException:
            self._place.release()
            await connection.aclose()
            raise
        self._place.release()
        await self._connections.give_back(connection, self._idle)


async def _answer_unless_broken(connection: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response | None:
    """Send a request on a connection that was used before. None if the connection breaks before the answer begins."""
    try:
        return await connection.handle_async_request(request)
    except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
        await connection.aclose()
        return None


def _most_connections() -> int:
    """Raise the number of files that this process may open, and return half of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(_MOST_FILES, hard) if hard != resource.RLIM_INFINITY else _MOST_FILES
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(64, (max(soft, most) - _OTHER_FILES) // 2)
