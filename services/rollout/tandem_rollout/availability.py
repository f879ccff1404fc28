"""Report which generators cannot be used or are silent: when that changes, and every 30 seconds while it lasts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tandem_protocol.logs import fields

log = logging.getLogger(__name__)

REPEAT_S = 30.0


@dataclass
class _Outage:
    since_s: float
    reported_s: float | None


class Availability:
    """The outages of the generators, by URL. Times are on the monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, delay_s: float = 0.0) -> None:
        """
        Args:
            delay_s: how long an outage lasts before it is reported.
        """
        self._clock = clock
        self._delay_s = delay_s
        self._outages: dict[str, _Outage] = {}

    def failed(self, url: str, reason: str) -> None:
        """Note that a request to `url` failed and will be tried again."""
        now_s = self._clock()
        outage = self._outages.setdefault(url, _Outage(now_s, None))
        waited_s = now_s - outage.since_s
        if waited_s < self._delay_s or (outage.reported_s is not None and now_s - outage.reported_s < REPEAT_S):
            return
        so_far = f" after {waited_s:.0f} s" if waited_s else ""
        log.warning(
            "%s for generator %s%s: %s",
            "waiting" if outage.reported_s is None else "still waiting",
            url,
            so_far,
            reason,
            extra=fields(generator=url, reason=reason, waited_s=round(waited_s, 1)),
        )
        outage.reported_s = now_s

    def answered(self, url: str) -> None:
        """Note that a request to `url` succeeded."""
        outage = self._outages.pop(url, None)
        if outage and outage.reported_s is not None:
            waited_s = self._clock() - outage.since_s
            log.info(
                "generator %s answers again after %.0f s",
                url,
                waited_s,
                extra=fields(generator=url, waited_s=round(waited_s, 1)),
            )

    def gone(self, urls: set[str]) -> None:
        """Forget generators that are not among `urls`: their names no longer have these addresses."""
        for url in self._outages.keys() - urls:
            if self._outages.pop(url).reported_s is None:
                continue
            log.warning("generator %s has left", url, extra=fields(generator=url))

    @asynccontextmanager
    async def watched(self, url: str) -> AsyncIterator[Callable[[], None]]:
        """Report every 30 seconds that the request to `url` in this block brings nothing: it works, or it hangs.

        Yields a function to call when something arrives.
        """
        heard_s = self._clock()

        def heard() -> None:
            nonlocal heard_s
            heard_s = self._clock()

        async def watch() -> None:
            while True:
                await asyncio.sleep(REPEAT_S)
                if (silent_s := self._clock() - heard_s) >= REPEAT_S:
                    log.info(
                        "generator %s has sent nothing for %.0f s",
                        url,
                        silent_s,
                        extra=fields(generator=url, silent_s=round(silent_s, 1)),
                    )

        watching = asyncio.create_task(watch())
        try:
            yield heard
        finally:
            watching.cancel()
