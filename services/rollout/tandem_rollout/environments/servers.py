"""A client for environment servers: it finds the replicas, distributes the sessions, and sends their requests."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import httpx

from tandem_protocol.config import ENVIRONMENT_TOKEN_ENV, ENVIRONMENT_TOKEN_FILE_ENV
from tandem_protocol.errors import TandemError, Unauthorized
from tandem_protocol.messages import Message

from ..answers import read_message, reason_of
from ..connections import Connections
from ..errors import UserError
from ..replicas import Replicas
from . import wire
from .base import EnvironmentFailed, EnvironmentLost

MessageT = TypeVar("MessageT", bound=Message)

CONNECT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 30.0
"""How long an unused connection is kept. Servers must keep theirs longer."""
UNREACHABLE_S = 60.0
"""How long to try if no replica can be reached. One that has died is back by then."""
AVOIDED_S = 3.0
"""For how long a replica that cannot be reached gets no sessions if there are others."""
FULL_PAUSE_S = 0.5
"""Pause before another try at a replica that is full."""
RETRY_PAUSE_S = 0.2
MAX_ANSWER_BYTES = 16 * 1024 * 1024


class Place(NamedTuple):
    """Where a session is."""

    replica: str
    """Base URL."""
    session: str


class _Unreachable(EnvironmentLost):
    """The replica cannot be connected to, so it has not seen the request."""


class Servers:
    """The servers. A new session goes to the replica with the fewest, and stays there."""

    def __init__(
        self,
        urls: Sequence[str],
        token: str | None,
        *,
        owner: str,
        timeout_s: float,
        open_timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            urls: base URLs. A name with several addresses stands for several replicas.
            owner: a name of this client that is the same after a restart, and that no other client has.
            timeout_s: time limit of one call of the project's code on the server.
            open_timeout_s: how long an episode may wait until a server has room for it.
        """
        self._replicas = Replicas(urls)
        self._owner = owner
        self._timeout_s = timeout_s
        self._open_timeout_s = open_timeout_s
        self._sessions: Counter[str] = Counter()
        self._avoided: dict[str, float] = {}
        """Replica → until when it gets no new sessions."""
        self._http = httpx.AsyncClient(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}),
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),  # every request has its own deadline
            transport=transport or Connections(keep_alive_s=KEEP_ALIVE_S),
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def infos(self, timeout_s: float) -> dict[str, wire.EnvironmentInfo]:
        """Wait until every replica answers, and close what an earlier process of this client left behind.

        Returns:
            URL → what the replica offers.

        Raises:
            UserError: a replica cannot be reached in time, or refuses the token.
        """
        return {url: await self._info(url, timeout_s) for url in await self._replicas.now()}

    async def open(self, body: wire.OpenSession) -> tuple[Place, wire.SessionOpened]:
        """Open a session. If the replicas are full, wait until one has room.

        Raises:
            EnvironmentFailed: no replica can be reached, all are full for too long, or the environment cannot begin.
        """
        body = body.model_copy(update={"owner": self._owner})
        clock = asyncio.get_running_loop().time
        give_up_s = clock() + UNREACHABLE_S
        reason = ""
        try:
            async with asyncio.timeout(self._open_timeout_s):
                while True:
                    place = Place(await self._choose(), secrets.token_hex(8))
                    try:
                        return place, await self._opened(place, body)
                    except _Unreachable as error:
                        reason = str(error)
                        self._avoid(place.replica, AVOIDED_S)
                        if clock() > give_up_s:
                            raise
                    except TandemError as error:
                        if not error.retryable:
                            raise EnvironmentFailed(f"{place.replica}: {error}") from error
                        reason = f"{place.replica}: {error}"
                        self._avoid(place.replica, FULL_PAUSE_S)
                        give_up_s = clock() + UNREACHABLE_S
                    await asyncio.sleep(RETRY_PAUSE_S)
        except TimeoutError as error:
            raise EnvironmentFailed(
                f"no environment server had room within {self._open_timeout_s:g} s; the last said: {reason}"
            ) from error

    async def request(
        self, place: Place, method: str, path: str, kind: type[MessageT], *, calls: int = 1, body: Message | None = None
    ) -> MessageT:
        """Send a request of a session. If the connection breaks, it is sent once more: requests can be repeated.

        Args:
            calls: how many calls of the project's code it makes.

        Raises:
            EnvironmentFailed: the environment failed, the server does not know the session, or it cannot be reached.
        """
        try:
            return await self._send(place, method, path, kind, calls=calls, body=body)
        except _Unreachable:
            self._avoid(place.replica, AVOIDED_S)
            raise
        except wire.UnknownSession as error:
            raise EnvironmentLost(f"{place.replica}: {error}") from error
        except TandemError as error:
            raise EnvironmentFailed(f"{place.replica}: {error}") from error

    async def release(self, place: Place, *, failed: bool) -> None:
        """Close a session. It does not matter whether the server can be reached: it discards idle sessions itself."""
        self._sessions[place.replica] -= 1
        url = place.replica + wire.SESSION.format(session=place.session)
        try:
            async with asyncio.timeout(wire.MARGIN_S):
                await self._http.delete(url, params={"failed": failed})
        except (httpx.HTTPError, TimeoutError):
            pass

    async def _opened(self, place: Place, body: wire.OpenSession) -> wire.SessionOpened:
        self._sessions[place.replica] += 1
        try:
            calls = wire.CALLS_TO_OPEN
            return await self._send(place, "PUT", wire.SESSION, wire.SessionOpened, calls=calls, body=body)
        except BaseException as error:
            if isinstance(error, _Unreachable | TandemError):  # there is nothing to close
                self._sessions[place.replica] -= 1
            else:
                await self.release(place, failed=True)
            raise

    async def _send(
        self, place: Place, method: str, path: str, kind: type[MessageT], *, calls: int, body: Message | None
    ) -> MessageT:
        url = place.replica + path.replace("{session}", place.session)
        content = body.model_dump_json() if body else None
        limit_s = wire.deadline_s(self._timeout_s, calls) + wire.MARGIN_S
        try:
            async with asyncio.timeout(limit_s):
                try:
                    response = await self._exchange(method, url, content)
                except httpx.TransportError:
                    await asyncio.sleep(RETRY_PAUSE_S)
                    response = await self._exchange(method, url, content)
        except TimeoutError as error:
            raise EnvironmentLost(f"{place.replica}: no answer within {limit_s:g} s") from error
        except httpx.TransportError as error:
            never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raise (_Unreachable if never_sent else EnvironmentLost)(
                f"{place.replica} cannot be reached: {reason_of(error)}"
            ) from error
        return read_message(kind, response)

    async def _exchange(self, method: str, url: str, content: str | None = None) -> httpx.Response:
        """Send a request once. An answer that is too long is not read: the server may not be trusted.

        Raises:
            httpx.TransportError: the connection failed.
            EnvironmentFailed: the answer is too long, or is not compressed as it says.
        """
        async with self._http.stream(method, url, content=content) as response:
            received = bytearray()
            try:
                async for part in response.aiter_bytes():
                    received += part
                    if len(received) > MAX_ANSWER_BYTES:
                        raise EnvironmentFailed(f"{url} answered more than {MAX_ANSWER_BYTES} bytes")
            except httpx.DecodingError as error:
                raise EnvironmentFailed(f"{url} answered with a body that cannot be decompressed: {error}") from error
            return httpx.Response(response.status_code, content=bytes(received), request=response.request)

    async def _info(self, url: str, timeout_s: float) -> wire.EnvironmentInfo:
        reason = ""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        await self._http.delete(url + wire.SESSIONS, params={"owner": self._owner})
                        return read_message(wire.EnvironmentInfo, await self._exchange("GET", url + wire.ENVIRONMENT))
                    except httpx.TransportError as error:
                        reason = reason_of(error)
                    await asyncio.sleep(RETRY_PAUSE_S)
        except TimeoutError as error:
            raise UserError(
                f"environment server {url} does not answer: {reason or 'no answer'}, after {timeout_s:g} s "
                "(trainer.start_timeout_s). Fix: start it (compose: --profile environment; chart: "
                "environment.enabled), or correct trainer.rollout.environment_urls."
            ) from error
        except Unauthorized as error:
            raise UserError(
                f"environment server {url} refuses the token: {error} The variables are {ENVIRONMENT_TOKEN_ENV} and "
                f"{ENVIRONMENT_TOKEN_FILE_ENV}."
            ) from error
        except (TandemError, EnvironmentFailed) as error:
            raise UserError(f"environment server {url}: {error}") from error

    async def _choose(self) -> str:
        """Return the replica with the fewest sessions, of those that are not avoided if there are any."""
        now_s = asyncio.get_running_loop().time()
        urls = await self._replicas.now()
        good = [url for url in urls if self._avoided.get(url, 0.0) <= now_s]
        return min(good or urls, key=lambda url: self._sessions[url])

    def _avoid(self, replica: str, seconds: float) -> None:
        self._avoided[replica] = asyncio.get_running_loop().time() + seconds
