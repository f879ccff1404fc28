"""Report which generators cannot be used or are silent: when that changes, and ever more rarely while it lasts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tandem_protocol.logs import event, fields
from tandem_protocol.repeats import FIRST_PAUSE_S, pause_after

log = logging.getLogger(__name__)

REPEAT_S = FIRST_PAUSE_S
"""After this time, an outage or a silence is reported again. The pauses then grow, up to ten minutes."""
LOST, BACK, LEFT = "generator_lost", "generator_back", "generator_left"
"""Kinds of events."""


@dataclass
class _Outage:
    since_s: float
    reported_s: float | None
    pause_s: float
    """Until it is reported again."""
    is_event: bool = False
    """Whether it is an event. It is none if the generator has never answered: then it is still starting."""


@dataclass
class _Silence:
    since_s: float
    pause_s: float
    requests: int = 0
    reported_s: float | None = None
    watching: asyncio.TimerHandle | None = None


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
        self._known: set[str] = set()
        """Generators that have answered once."""
        self._silences: dict[tuple[str, str], _Silence] = {}

    def failed(self, url: str, reason: str, kind: str = LOST) -> None:
        """Note that a request to `url` failed and will be tried again.

        Args:
            kind: of the event.
        """
        now_s = self._clock()
        outage = self._outages.setdefault(url, _Outage(now_s, None, REPEAT_S))
        waited_s = now_s - outage.since_s
        if waited_s < self._delay_s or (outage.reported_s is not None and now_s - outage.reported_s < outage.pause_s):
            return
        details = {"generator": url, "reason": reason, "waited_s": round(waited_s, 1)}
        is_event = outage.reported_s is None and (kind != LOST or url in self._known)
        outage.is_event |= is_event
        so_far = f" after {waited_s:.0f} s" if waited_s else ""
        log.warning(
            "%s for generator %s%s: %s",
            "waiting" if outage.reported_s is None else "still waiting",
            url,
            so_far,
            reason,
            extra=event(kind, **details) if is_event else fields(**details),
        )
        if outage.reported_s is not None:
            outage.pause_s = pause_after(outage.pause_s)
        outage.reported_s = now_s

    def answered(self, url: str) -> None:
        """Note that a request to `url` succeeded."""
        self._known.add(url)
        outage = self._outages.pop(url, None)
        if outage and outage.reported_s is not None:
            waited_s = self._clock() - outage.since_s
            details = {"generator": url, "waited_s": round(waited_s, 1)}
            log.info(
                "generator %s answers again after %.0f s",
                url,
                waited_s,
                extra=event(BACK, **details) if outage.is_event else fields(**details),
            )

    def gone(self, urls: set[str]) -> None:
        """Forget generators that are not among `urls`: their names no longer have these addresses."""
        for url in self._outages.keys() - urls:
            self._known.discard(url)
            if self._outages.pop(url).reported_s is None:
                continue
            log.warning("generator %s has left", url, extra=event(LEFT, generator=url))

    @asynccontextmanager
    async def watched(self, url: str, what: str = "") -> AsyncIterator[Callable[[], None]]:
        """Report after 30 seconds, and then ever more rarely, that the requests to `url` in such blocks bring nothing.

        It works, or it hangs.

        Yields a function to call when something arrives.

        Args:
            what: requests with the same URL and the same name are watched together.
        """
        silence = self._silences.get((url, what))
        if silence is None:
            silence = self._silences[url, what] = _Silence(self._clock(), pause_s=REPEAT_S)
            watching = asyncio.get_running_loop().call_later(REPEAT_S, self._report_silence, url, what)
            silence.watching = watching
        silence.requests += 1

        def heard() -> None:
            silence.since_s, silence.reported_s, silence.pause_s = self._clock(), None, REPEAT_S

        try:
            yield heard
        finally:
            silence.requests -= 1
            if not silence.requests:
                del self._silences[url, what]
                assert silence.watching is not None, "set above"
                silence.watching.cancel()

    def _report_silence(self, url: str, what: str) -> None:
        silence = self._silences[url, what]
        silence.watching = asyncio.get_running_loop().call_later(REPEAT_S, self._report_silence, url, what)
        now_s = self._clock()
        reported_s = silence.since_s if silence.reported_s is None else silence.reported_s
        if (silent_s := now_s - silence.since_s) >= REPEAT_S and now_s - reported_s >= silence.pause_s:
            silence.pause_s = silence.pause_s if silence.reported_s is None else pause_after(silence.pause_s)
            silence.reported_s = now_s
            log.info(
                "generator %s has sent nothing new for %.0f s",
                url,
                silent_s,
                extra=fields(generator=url, silent_s=round(silent_s, 1)),
            )
