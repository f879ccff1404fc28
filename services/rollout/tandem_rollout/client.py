"""The trainer's HTTP client for all generator replicas. It is asynchronous and runs in the background thread."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
from pydantic import ValidationError

from tandem_protocol.errors import EngineFailed, StalePolicy, TandemError
from tandem_protocol.messages import (
    PROTOCOL_VERSION,
    Group,
    Info,
    Message,
    Parameters,
    Prompt,
    Readiness,
    RolloutRequest,
    ServedWeights,
    SetWeights,
)
from tandem_protocol.parameters import Shapes
from tandem_protocol.routes import INFO, PARAMETERS, READYZ, SET_WEIGHTS, WEIGHTS
from tandem_protocol.version import Version

from .answers import checked, event_of, read_message, read_served, reason_of
from .availability import REPEAT_S, Availability
from .awaited_versions import AwaitedVersions
from .connections import Connections
from .dispatch import Dispatch
from .protocols import Protocols
from .replicas import Replicas
from .streams import Streams
from .tasks import task_group

FIRST_PAUSE_S = 0.1
"""Pause after the first failure. It doubles with each further one."""
LONGEST_PAUSE_S = 5.0
CONNECT_TIMEOUT_S = 10.0
LOOKUP_S = 2.0
"""How old the list of replicas may be for a first request. After a failure it is looked up again."""
UNREACHABLE = (httpx.ConnectError, httpx.ConnectTimeout)
UNREACHABLE_TRIES = 2
"""One refused connection may be an accident."""
UNREACHABLE_PAUSE_S = 0.5
"""Longest pause before another try, because the others may be done by then."""

ResultT = TypeVar("ResultT")
MessageT = TypeVar("MessageT", bound=Message)


class GeneratorClient:
    """Calls every replica, and retries what `errors.py` calls retryable until the caller's deadline.

    The list of replicas is looked up again and again, and after every failure, because a replica may leave and return.
    """

    def __init__(
        self,
        urls: Sequence[str],
        token: str | None,
        *,
        stall_timeout_s: float = 300.0,
        rank: int = 0,
        reports: bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            stall_timeout_s: how long a replica may sample nothing. Then the missing groups are requested again.
            reports: Whether this process reports outages. Another one reports only what may concern it alone: an outage
                of REPEAT_S while it waits for its own rollouts.
        """
        transport = transport or Connections()
        self._replicas = Replicas(urls, reports=reports)
        self._reports = reports
        self._availability = Availability(delay_s=0 if reports else REPEAT_S)
        self._http = httpx.AsyncClient(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}),
            # No read timeout here: a group may take minutes. Every caller has its own deadline.
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            transport=transport,
            trust_env=False,
        )
        self.protocols = Protocols(self._http)
        self.dispatch = Dispatch(rank)
        self.on_stale: Callable[[Version], object] | None = None
        """Called when a replica serves an older version than a request needs."""
        self._awaited = AwaitedVersions(self._wait_for_version)
        self._streams = Streams(
            self._http,
            dispatch=self.dispatch,
            protocols=self.protocols,
            availability=self._availability,
            connect_timeout_s=CONNECT_TIMEOUT_S,
            stall_timeout_s=stall_timeout_s,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._awaited.close()
        self.protocols.close()
        await self._http.aclose()

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until every replica is ready.

        Raises:
            TimeoutError: a replica is not ready in time; names it and its last reason.
        """
        await self._everywhere(self._ready, timeout_s, "be ready (trainer.start_timeout_s)")

    async def info(self, timeout_s: float) -> dict[str, Info]:
        """Return URL → `Info` for every replica."""
        return await self._everywhere(self._info, timeout_s, "answer GET /info")

    async def parameters(self, url: str, timeout_s: float) -> Shapes:
        """Return the parameter table of the replica at `url`. It is empty if the replica does not know it."""
        async with asyncio.timeout(timeout_s):
            response = checked(await self._http.get(url + PARAMETERS))
        return Parameters.model_validate_json(response.content).shapes

    async def set_weights(self, version: Version, weights: SetWeights, timeout_s: float) -> dict[str, ServedWeights]:
        """Make every replica serve `version`, and return when all of them do.

        A replica that cannot be reached is left out if another one serves the version. When it starts again, it loads
        the newest version before it is ready.

        Raises:
            TandemError: a replica refused.
            TimeoutError: a replica did not serve it in time.
        """

        async def put(url: str) -> ServedWeights:
            path = SET_WEIGHTS.format(version=version)
            response = await self._http.put(url + path, content=weights.model_dump_json())
            return read_served(response)

        purpose = f"serve version {version} (trainer.publish.timeout_s)"
        return await self._everywhere(put, timeout_s, purpose, skip_unreachable=True)

    async def expect(self, version: Version) -> None:
        """Note that the replicas will serve `version` soon. Requests that need it wait for that, and ask nobody."""
        self._awaited.coming = version
        for url in await self._replicas.now(max_age_s=float("inf")):  # the trainer must not wait for DNS
            self._expect(url, version)

    async def until_served(self, version: Version, *, timeout_s: float) -> None:
        """Wait until a replica serves `version` if it is on its way (`expect`), but no longer than `timeout_s`."""

        async def behind() -> list[str]:
            return [url for url in await self._replicas.now(max_age_s=LOOKUP_S) if self._expect(url, version)]

        await self._awaited.until_served(version, behind, timeout_s)

    async def rollouts(self, request: RolloutRequest, on_group: Callable[[Group], object], *, timeout_s: float) -> None:
        """Divide `request` among the replicas, and call `on_group` exactly once for each group, as soon as it arrives.

        If a replica fails, only its missing groups are requested again, from another replica if there is one.

        Raises:
            TandemError: a replica refused the request, and a retry would not help.
            TimeoutError: groups are missing after `timeout_s`.
        """
        call = _Call(request, on_group, dict(enumerate(request.prompts)))
        try:
            async with asyncio.timeout(timeout_s):
                parts = await self._divide(request, call.missing)
                if len(parts) == 1:  # needs no task: there may be thousands of such calls
                    await self._ask(call, *parts.popitem())
                async with task_group() as tasks:
                    for url, mine in parts.items():
                        tasks.create_task(self._ask(call, url, mine))
        except TimeoutError:
            raise TimeoutError(
                f"{len(call.missing)} of {len(request.prompts)} groups are missing after {timeout_s:g} s; last errors: "
                f"{call.reasons or 'none, the generators are slow'}. Fix: read the generators' logs, or raise "
                "trainer.rollout.timeout_s."
            ) from None

    async def _ask(self, call: _Call, url: str, mine: dict[int, Prompt]) -> None:
        """Get the groups of `mine`, from `url` first."""
        pauses = _pauses()
        stale = 0
        while mine:
            try:
                await self._streams.ask(url, call.request, mine, call.take)
                self._availability.answered(url)
            except (httpx.TransportError, TandemError) as error:
                call.reasons[url] = self._retryable(url, error)
                if isinstance(error, StalePolicy) and self._expect(url, call.request.min_version):
                    stale += 1
                    if self.on_stale and call.request.min_version:
                        self.on_stale(call.request.min_version)
                    if stale > 1:  # several replicas behind one URL may contradict each other
                        await asyncio.sleep(next(pauses))
                else:
                    self.dispatch.failed(url)
                    await asyncio.sleep(next(pauses))
            if mine:
                (url,) = await self._divide(call.request, mine, together=True, max_age_s=0.0)

    async def _divide(
        self,
        request: RolloutRequest,
        prompts: dict[int, Prompt],
        *,
        together: bool = False,
        max_age_s: float = LOOKUP_S,
    ) -> dict[str, dict[int, Prompt]]:
        """Return URL → the prompts that it gets. Waits while all replicas serve an older version than is needed.

        Args:
            together: all prompts go to the same replica.
            max_age_s: how old the list of replicas may be.
        """
        urls = await self._replicas.now(max_age_s=max_age_s)
        version = request.min_version
        while version and not (ahead := [url for url in urls if not self._awaited.is_behind(url, version)]):
            await self._awaited.any(urls, version)
            urls = await self._replicas.now(max_age_s=max_age_s)
        tokens = request.sampling.n * request.sampling.max_tokens
        parts = self.dispatch.divide(prompts, tokens, ahead if version else urls, together=together)
        return {url: {index: prompts[index] for index in indices} for url, indices in parts.items()}

    def _expect(self, url: str, version: Version | None) -> bool:
        """Ask a replica that serves an older version to say when that changes. Returns whether it can."""
        if version is None or self.protocols.known(url) < 2:
            return False
        self._awaited.expect(url, version)
        return True

    async def _wait_for_version(self, url: str, version: Version, wait_s: float) -> None:
        parameters: dict[str, str | float] = {"at_least": str(version), "wait_s": wait_s}
        timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=wait_s + CONNECT_TIMEOUT_S)
        checked(await self._http.get(url + WEIGHTS, params=parameters, timeout=timeout))

    async def _ready(self, url: str) -> None:
        response = await self._http.get(url + READYZ)
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            with suppress(ValidationError):  # the answer may come from a proxy
                raise EngineFailed(Readiness.model_validate_json(response.content).reason)
        checked(response)

    async def _info(self, url: str) -> Info:
        info = read_message(Info, await self._http.get(url + INFO, params={"protocol": PROTOCOL_VERSION}))
        self.protocols.learn(url, info.protocol)
        return info

    async def _everywhere(
        self,
        call: Callable[[str], Awaitable[ResultT]],
        timeout_s: float,
        purpose: str,
        *,
        skip_unreachable: bool = False,
    ) -> dict[str, ResultT]:
        """Call `call` for every replica in parallel, with retries, and return URL → answer.

        A replica that joins meanwhile is called too. One that leaves is not waited for.

        Args:
            skip_unreachable: do not wait for replicas that cannot be reached if another one has answered.

        Raises:
            TandemError: a call failed, and a retry would not help.
            TimeoutError: a replica did not answer in time; names it and its last error.
        """
        reasons: dict[str, str] = {}
        urls: set[str] = set()
        done: dict[str, ResultT] = {}
        unreachable: Counter[str] = Counter()

        def is_settled(url: str) -> bool:
            return url in done or (skip_unreachable and unreachable[url] >= UNREACHABLE_TRIES and bool(done))

        async def until_settled(url: str) -> None:
            pauses = _pauses()
            while not is_settled(url) and url in await self._replicas.now():
                try:
                    async with self._availability.watched(url, purpose):
                        done[url] = await call(url)
                    self._availability.answered(url)
                except UNREACHABLE as error:
                    reasons[url] = self._retryable(url, error, report=self._reports)
                    unreachable[url] += 1
                    await asyncio.sleep(min(next(pauses), UNREACHABLE_PAUSE_S))
                except (httpx.TransportError, TandemError) as error:
                    reasons[url] = self._retryable(url, error, report=self._reports)
                    del unreachable[url]
                    await asyncio.sleep(next(pauses))

        try:
            async with asyncio.timeout(timeout_s):
                while not all(map(is_settled, urls := set(await self._replicas.now()))):
                    self._availability.gone(urls)
                    async with task_group() as tasks:
                        for url in urls:
                            tasks.create_task(until_settled(url))
        except TimeoutError:
            late = {url: reasons.get(url, "no answer") for url in sorted(urls - done.keys())}
            raise TimeoutError(f"waited {timeout_s:g} s for the generators to {purpose}; got {late}") from None
        return {url: done[url] for url in urls if url in done}

    def _retryable(self, url: str, error: httpx.TransportError | TandemError, *, report: bool = True) -> str:
        """Report a retryable error, and return its description for the message at the deadline. Raise any other."""
        if isinstance(error, TandemError) and not error.retryable:
            raise type(error)(f"{url}: {error}") from error
        if isinstance(error, httpx.TransportError):
            self.protocols.forget(url)
        reason = reason_of(error)
        if report:
            self._availability.failed(url, reason, event_of(error))
        return reason


@dataclass(frozen=True)
class _Call:
    """A call of `rollouts`."""

    request: RolloutRequest
    on_group: Callable[[Group], object]
    missing: dict[int, Prompt]
    reasons: dict[str, str] = field(default_factory=dict)
    """URL → last error."""

    def take(self, group: Group) -> None:
        """Hand over a group."""
        del self.missing[group.prompt_index]
        self.on_group(group)


def _pauses() -> Iterator[float]:
    """Yield the pause before each retry in seconds, without end."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
