"""Wait until a replica serves a version. All requests that wait for the same replica share one question."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import httpx

from tandem_protocol.errors import TandemError
from tandem_protocol.version import Version

WAIT_S = 20.0
"""How long a replica waits before it answers that it does not serve the version."""
PAUSE_S = 1.0
"""Pause after a question that failed."""

Ask = Callable[[str, Version, float], Awaitable[object]]
"""URL, version and seconds: returns when the replica serves the version, or raises."""


class AwaitedVersions:
    """The replicas that have said that they serve an older version than a request needs."""

    def __init__(self, ask: Ask) -> None:
        self.coming: Version | None = None
        """The version that is being published, until a replica serves it."""
        self._ask = ask
        self._waiting: dict[tuple[str, Version], asyncio.Task[None]] = {}

    def is_behind(self, url: str, version: Version | None) -> bool:
        """Whether the replica is known to serve an older version."""
        return version is not None and (url, version) in self._waiting

    def expect(self, url: str, version: Version) -> None:
        """Note that the replica serves an older version, and ask it to say when that changes."""
        if (url, version) not in self._waiting:
            task = asyncio.create_task(self._wait(url, version))
            self._waiting[url, version] = task
            task.add_done_callback(lambda _: self._waiting.pop((url, version), None))

    async def any(self, urls: Sequence[str], version: Version) -> None:
        """Wait until one of these replicas, which are all behind, serves the version or is worth another try."""
        tasks = [self._waiting[url, version] for url in urls if (url, version) in self._waiting]
        if len(tasks) == len(urls):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    async def until_served(
        self, version: Version, behind: Callable[[], Awaitable[Sequence[str]]], timeout_s: float
    ) -> None:
        """Wait until a replica serves a version that is being published. After `timeout_s`, this waits no longer.

        Args:
            behind: returns the replicas that are asked when they serve it.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while version == self.coming and (urls := await behind()):
                    tasks = [self._waiting[url, version] for url in urls]
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            self.coming = None

    async def close(self) -> None:
        """Stop waiting."""
        tasks = list(self._waiting.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _wait(self, url: str, version: Version) -> None:
        try:
            await self._ask(url, version, WAIT_S)
            if version == self.coming:
                self.coming = None
        except (httpx.TransportError, TandemError):
            await asyncio.sleep(PAUSE_S)  # the next request to the replica reports what is wrong
