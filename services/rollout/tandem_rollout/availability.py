"""Report which generators cannot be used: when that changes, and every 30 seconds while it lasts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from tandem_protocol.logs import fields

log = logging.getLogger(__name__)

REPEAT_S = 30.0


@dataclass
class _Outage:
    since_s: float
    reported_s: float


class Availability:
    """The outages of the generators, by URL. Times are on the monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._outages: dict[str, _Outage] = {}

    def failed(self, url: str, reason: str) -> None:
        """Note that a request to `url` failed and will be tried again."""
        now_s = self._clock()
        outage = self._outages.get(url)
        if outage is None:
            self._outages[url] = _Outage(now_s, now_s)
            log.warning("waiting for generator %s: %s", url, reason, extra=fields(generator=url, reason=reason))
        elif now_s - outage.reported_s >= REPEAT_S:
            outage.reported_s = now_s
            waited_s = now_s - outage.since_s
            log.warning(
                "still waiting for generator %s after %.0f s: %s",
                url,
                waited_s,
                reason,
                extra=fields(generator=url, reason=reason, waited_s=round(waited_s, 1)),
            )

    def answered(self, url: str) -> None:
        """Note that a request to `url` succeeded."""
        if outage := self._outages.pop(url, None):
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
            del self._outages[url]
            log.warning("generator %s has left", url, extra=fields(generator=url))
