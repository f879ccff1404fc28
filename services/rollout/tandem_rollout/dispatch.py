"""Choose a replica for each prompt: the one of its session, or the one with the fewest outstanding tokens.

Outstanding are the tokens that a replica may still have to sample: `max_tokens` of every completion that was requested
from it and has not arrived. A slow replica has more of them, so it gets fewer prompts.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from tandem_protocol.messages import Prompt

FIRST_REST_S = 0.1
"""How long a replica that has failed gets no prompts if there are others. It doubles with each further failure."""
LONGEST_REST_S = 5.0
_REMEMBERED_SESSIONS = 65_536
"""Nobody says when a session ends, so the ones that were used last are remembered."""


class Loads(NamedTuple):
    """Tokens of each replica, by URL."""

    sampled: dict[str, int]
    outstanding: dict[str, int]


class Load:
    """The outstanding tokens of one request."""

    def __init__(self, outstanding: Counter[str], url: str, prompts: int, tokens_per_prompt: int) -> None:
        self._outstanding = outstanding
        self._url = url
        self._prompts = prompts
        self._tokens_per_prompt = tokens_per_prompt
        outstanding[url] += prompts * tokens_per_prompt

    def answered(self, prompts: int = 1) -> None:
        """Note that this number of prompts have received their groups."""
        self._prompts -= prompts
        self._outstanding[self._url] -= prompts * self._tokens_per_prompt

    def end(self) -> None:
        """Note that the request has ended, with or without all groups."""
        self.answered(self._prompts)


@dataclass
class _Failures:
    """Failures of a replica, since it last sampled something. `availability.py` reports failures of any request, and
    forgets them when any request is answered, such as one that sets weights."""

    in_a_row: int = 0
    rests_until_s: float = 0.0
    """Until when it gets no prompts if there are others."""
    counted_until_s: float = 0.0
    """Until when further failures belong to the last one."""

    @property
    def rest_s(self) -> float:
        return float(min(FIRST_REST_S * 2.0 ** min(self.in_a_row - 1, 16), LONGEST_REST_S))


class Dispatch:
    """What is known about the replicas, by URL. Times are on the monotonic clock."""

    def __init__(self, first: int = 0, *, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            first: index of the replica that gets the first prompt. Ranks start at different replicas. Otherwise the
                first replica would get most of the short requests.
        """
        self.outstanding: Counter[str] = Counter()
        """URL → outstanding tokens of this process."""
        self.sampled: Counter[str] = Counter()
        """URL → tokens that it has sampled for this process since `loads` was called."""
        self._turn = first
        self._clock = clock
        self._sessions: OrderedDict[str, str] = OrderedDict()
        self._failures: dict[str, _Failures] = {}

    def divide(
        self, prompts: Mapping[int, Prompt], tokens_per_prompt: int, urls: Sequence[str], *, together: bool = False
    ) -> dict[str, list[int]]:
        """Return URL → indices of the prompts that it gets.

        Args:
            together: all prompts go to the replica of the first one.
        """
        parts: dict[str, list[int]] = {}
        outstanding = Counter({url: self.outstanding[url] for url in urls})
        for index, prompt in prompts.items():
            if together and parts:
                next(iter(parts.values())).append(index)
                continue
            url = self._of_session(prompt.session, urls) or self._least(urls, outstanding)
            outstanding[url] += tokens_per_prompt
            parts.setdefault(url, []).append(index)
            if prompt.session is not None:
                self._remember(prompt.session, url)
        for url in parts.keys() & self._failures.keys():  # this request finds out whether it works again
            self._failures[url].rests_until_s = self._clock() + self._failures[url].rest_s
        return parts

    @contextmanager
    def sending(self, url: str, prompts: int, tokens_per_prompt: int) -> Iterator[Load]:
        """Count the tokens of a request as outstanding, until their groups arrive or the request ends."""
        load = Load(self.outstanding, url, prompts, tokens_per_prompt)
        try:
            yield load
        finally:
            load.end()

    def loads(self) -> Loads:
        """Return what the replicas have sampled since the last call, and what is outstanding now."""
        sampled = {url: self.sampled[url] for url in sorted({*self.sampled, *+self.outstanding})}
        self.sampled.clear()
        return Loads(sampled, {url: self.outstanding[url] for url in sampled})

    def failed(self, url: str) -> None:
        """Note that a request failed. Requests that fail at the same time count once."""
        now_s = self._clock()
        failures = self._failures.setdefault(url, _Failures())
        if now_s >= failures.counted_until_s:
            failures.in_a_row += 1
            failures.counted_until_s = now_s + failures.rest_s
        failures.rests_until_s = now_s + failures.rest_s

    def works(self, url: str) -> None:
        """Note that a replica has sampled something."""
        self._failures.pop(url, None)

    def _rests(self, url: str) -> bool:
        return url in self._failures and self._clock() < self._failures[url].rests_until_s

    def _of_session(self, session: str | None, urls: Iterable[str]) -> str | None:
        """Return the replica that has the session, unless it has left or failed."""
        url = self._sessions.get(session or "")
        return url if url is not None and url in urls and not self._rests(url) else None

    def _least(self, urls: Sequence[str], outstanding: Counter[str]) -> str:
        """Return the replica with the fewest outstanding tokens. If there are several, they take turns."""
        able = [url for url in urls if not self._rests(url)]
        begin = self._turn
        self._turn += 1
        if not able:
            return min(urls, key=lambda url: (self._failures[url].in_a_row, outstanding[url]))
        return min(able, key=lambda url: (outstanding[url], (urls.index(url) - begin) % len(urls)))

    def _remember(self, session: str, url: str) -> None:
        self._sessions[session] = url
        self._sessions.move_to_end(session)
        if len(self._sessions) > _REMEMBERED_SESSIONS:
            self._sessions.popitem(last=False)
