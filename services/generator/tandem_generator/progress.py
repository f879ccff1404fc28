"""Put heartbeats into a stream of groups, so that its reader can tell a slow engine from one that hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from tandem_protocol.messages import Group, Progress


class TokenCount:
    """How many tokens a request has so far."""

    def __init__(self) -> None:
        self.tokens = 0

    def add(self, tokens: int) -> None:
        """Count new tokens."""
        self.tokens += tokens


async def with_heartbeats(
    groups: AsyncGenerator[Group, None], count: TokenCount, every_s: float | None
) -> AsyncGenerator[Group | Progress, None]:
    """Yield the groups, and the number of tokens so far whenever `every_s` seconds have passed without a group.

    Closing this generator also closes `groups`.

    Args:
        groups: The groups of a request.
        count: Counts the tokens of the same request.
        every_s: Time between two heartbeats, in seconds. None: no heartbeats.
    """
    following = asyncio.ensure_future(anext(groups))
    try:
        while True:
            done, _ = await asyncio.wait((following,), timeout=every_s)
            if not done:
                yield Progress(tokens=count.tokens)
                continue
            try:
                group = following.result()
            except StopAsyncIteration:
                return
            yield group
            following = asyncio.ensure_future(anext(groups))
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await groups.aclose()
