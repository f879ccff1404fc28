"""Which version of the wire contract each replica speaks. A generator refuses keys that are newer than its own."""

from __future__ import annotations

import asyncio

import httpx

from tandem_protocol.errors import EngineFailed
from tandem_protocol.messages import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION
from tandem_protocol.routes import INFO

TIMEOUT_S = 10.0
"""How long a replica may take to answer."""


class Protocols:
    """The versions, by URL. A replica is asked once, and again after its connection has failed."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._known: dict[str, int] = {}
        self._heard: dict[str, int] = {}  # as `_known`, but a replica that does not answer keeps what it has said
        self._asking: dict[str, asyncio.Task[int]] = {}

    def learn(self, url: str, protocol: int) -> None:
        """Note what a replica has said."""
        self._known[url] = self._heard[url] = protocol

    def forget(self, url: str) -> None:
        """Note that another release may answer at this URL from now on."""
        self._known.pop(url, None)

    def known(self, url: str) -> int:
        """Return the version of a replica. The oldest, if the replica has not been asked."""
        return self._known.get(url, OLDEST_PROTOCOL_VERSION)

    @property
    def oldest(self) -> int:
        """The oldest version that a replica has said last. If none has been asked, the newest."""
        return min(self._heard.values(), default=PROTOCOL_VERSION)

    async def of(self, url: str) -> int:
        """Return the version of a replica. Requests that ask at the same time share a question.

        Raises:
            httpx.TransportError: the replica cannot be reached.
            EngineFailed: it, or a proxy before it, cannot answer now.
        """
        if url in self._known:
            return self._known[url]
        if url not in self._asking:
            self._asking[url] = asyncio.create_task(self._asked(url))
            self._asking[url].add_done_callback(lambda task: self._ended(url, task))
        return await asyncio.shield(self._asking[url])

    async def has_changed(self, url: str, protocol: int) -> bool:
        """Return whether a replica speaks another version now than `protocol`.

        The replica is asked again, unless another request has learned its new version meanwhile.

        Raises:
            httpx.TransportError, EngineFailed: see `of`.
        """
        if self._known.get(url) == protocol:
            self.forget(url)
        return await self.of(url) != protocol

    def close(self) -> None:
        """Stop asking."""
        for task in self._asking.values():
            task.cancel()

    def _ended(self, url: str, task: asyncio.Task[int]) -> None:
        del self._asking[url]
        if not task.cancelled() and task.exception() is None:
            self.learn(url, task.result())

    async def _asked(self, url: str) -> int:
        """A replica whose answer cannot be read gets the oldest contract: only what every release understands."""
        response = await self._http.get(url + INFO, params={"protocol": PROTOCOL_VERSION}, timeout=TIMEOUT_S)
        if response.is_server_error:  # says nothing about the release, and would be remembered
            raise EngineFailed(f"GET {INFO} was answered with status {response.status_code}")
        try:
            return int(response.json()["protocol"]) if response.is_success else OLDEST_PROTOCOL_VERSION
        except (ValueError, TypeError, KeyError):
            return OLDEST_PROTOCOL_VERSION
