"""Send one request for rollouts to one replica, and read its answer: groups, and heartbeats in between."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import httpx

from tandem_protocol.errors import BadRequest, EngineFailed
from tandem_protocol.messages import Group, Progress, Prompt, RolloutRequest
from tandem_protocol.routes import ROLLOUTS

from .answers import checked, read_line, why_unusable
from .availability import Availability
from .dispatch import Dispatch
from .protocols import Protocols

clock = time.monotonic
_HEARTBEATS_PER_STALL = 10
_HEARTBEAT_S = (0.1, 10.0)
"""Shortest and longest time between two heartbeats."""


class Streams:
    """Sends requests for rollouts, and notices replicas that hang."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        *,
        dispatch: Dispatch,
        protocols: Protocols,
        availability: Availability,
        connect_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        self._http = http
        self._dispatch = dispatch
        self._protocols = protocols
        self._availability = availability
        # With or without heartbeats: a replica that sends nothing at all for so long is gone.
        self._timeout = httpx.Timeout(None, connect=connect_timeout_s, read=stall_timeout_s)
        self._stall_timeout_s = stall_timeout_s
        self._heartbeat_s = min(max(stall_timeout_s / _HEARTBEATS_PER_STALL, _HEARTBEAT_S[0]), _HEARTBEAT_S[1])
        self._progress_s: defaultdict[str, float] = defaultdict(float)
        """URL → when it last sampled a token, for any request."""

    async def ask(
        self, url: str, request: RolloutRequest, mine: dict[int, Prompt], on_group: Callable[[Group], object]
    ) -> None:
        """Request the groups of `mine` once, and remove from it those that arrive.

        Raises:
            EngineFailed: the replica hangs, or the stream ended and groups are missing.
            TandemError: the replica refused the request.
            httpx.TransportError: the connection failed.
        """
        requested = list(mine)
        trouble = "the stream ended early"
        tokens_per_prompt = request.sampling.n * request.sampling.max_tokens
        with self._dispatch.sending(url, len(mine), tokens_per_prompt) as load:
            protocol = await self._protocols.of(url)
            content = self._body(request, mine, protocol)
            stall = _Stall(self._stall_timeout_s)
            async with (
                self._availability.watched(url, "rollouts") as heard,
                self._http.stream("POST", url + ROLLOUTS, content=content, timeout=self._timeout) as response,
            ):
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    if response.status_code == BadRequest.status and await self._protocols.has_changed(url, protocol):
                        raise EngineFailed("another release of Tandem answers here now, which gets other requests")
                async for text in checked(response).aiter_lines():
                    answer = read_line(text)
                    if isinstance(answer, Progress):
                        if stall.has_new(answer.tokens):
                            heard()
                            self._progress_s[url] = clock()
                            self._dispatch.works(url)
                        stall.check(self._progress_s[url])
                        continue
                    heard()
                    stall.restart()
                    self._progress_s[url] = clock()
                    if problem := why_unusable(answer, request, len(requested)):
                        trouble = problem
                        continue
                    self._dispatch.works(url)
                    index = requested[answer.prompt_index]
                    if mine.pop(index, None) is not None:
                        self._dispatch.sampled[url] += sum(len(one.token_ids) for one in answer.completions)
                        load.answered()
                        on_group(answer.model_copy(update={"prompt_index": index}))
        if mine:
            raise EngineFailed(f"{len(mine)} of {len(requested)} groups are missing: {trouble}")

    def _body(self, request: RolloutRequest, mine: dict[int, Prompt], protocol: int) -> str:
        """Return the request for a part of the prompts, without keys that an older generator would refuse."""
        prompts = tuple(mine.values())
        if protocol < 2:
            prompts = tuple(prompt.model_copy(update={"session": None}) for prompt in prompts)
        part = request.model_copy(
            update={"prompts": prompts, "heartbeat_s": self._heartbeat_s if protocol >= 2 else None}
        )
        return part.model_dump_json(exclude_none=True)


class _Stall:
    """Notices that a request gets no new tokens. A request that waits for its turn does not stall."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._tokens = 0
        self._since_s = clock()

    def has_new(self, tokens: int) -> bool:
        """Note how many tokens there are, and return whether some are new."""
        if tokens <= self._tokens:
            return False
        self._tokens = tokens
        self.restart()
        return True

    def restart(self) -> None:
        """Note that something new has arrived."""
        self._since_s = clock()

    def check(self, replica_progress_s: float) -> None:
        """
        Args:
            replica_progress_s: when the replica last sampled a token for any request.

        Raises:
            EngineFailed: no new token has arrived for longer than the timeout.
        """
        last_s = self._since_s if self._tokens else max(self._since_s, replica_progress_s)
        if (silent_s := clock() - last_s) > self._timeout_s:
            raise EngineFailed(
                f"no new token for {silent_s:.1f} s (trainer.rollout.stall_timeout_s), although the generator answers: "
                "its engine hangs"
            )
