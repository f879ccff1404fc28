"""The trainer's end of the wire contract, over all generator replicas. Asynchronous; runs in the background thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import httpx
from pydantic import ValidationError

from tandem_protocol.errors import EngineFailed, ErrorBody, TandemError, from_body, not_finite
from tandem_protocol.messages import (
    Group,
    Info,
    Message,
    Parameters,
    Prompt,
    Readiness,
    RolloutLine,
    RolloutRequest,
    ServedWeights,
    SetWeights,
)
from tandem_protocol.parameters import Shapes
from tandem_protocol.problems import shorten, summarize
from tandem_protocol.routes import INFO, PARAMETERS, READYZ, ROLLOUTS, SET_WEIGHTS
from tandem_protocol.version import Version

from .replicas import Replicas

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Between two tries of the same thing; doubles from the first to the longest."""
CONNECT_TIMEOUT_S = 10.0

ResultT = TypeVar("ResultT")
MessageT = TypeVar("MessageT", bound=Message)


class GeneratorClient:
    """Talks to every replica; tries again what `errors.py` calls retryable, within the caller's deadline.

    Which replicas there are is looked up for every call and after every failure, since one may leave and come back.
    """

    def __init__(
        self,
        urls: Sequence[str],
        token: str | None,
        *,
        stall_timeout_s: float = 300.0,
        rank: int = 0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._replicas = Replicas(urls)
        self._next_replica = rank  # ranks begin apart, or the first replica would get most of short requests
        self._stream_timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S, read=stall_timeout_s)
        self._http = httpx.AsyncClient(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}),
            # Deadlines are the callers': a group may rightly take minutes.
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            transport=transport,
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until every replica serves a policy.

        Raises:
            TimeoutError: names the replica and its last reason.
        """
        await self._everywhere(self._ready, timeout_s, "be ready (trainer.start_timeout_s)")

    async def info(self, timeout_s: float) -> dict[str, Info]:
        """What every replica is, by its URL."""
        return await self._everywhere(self._info, timeout_s, "answer GET /info")

    async def parameters(self, url: str, timeout_s: float) -> Shapes:
        """The parameter table of the replica at `url`; empty where it does not know it."""
        async with asyncio.timeout(timeout_s):
            response = _checked(await self._http.get(url + PARAMETERS))
        return Parameters.model_validate_json(response.content).shapes

    async def set_weights(self, version: Version, weights: SetWeights, timeout_s: float) -> dict[str, ServedWeights]:
        """Make every replica serve `version`; returns when all do.

        Raises:
            TandemError: a replica refused.
            TimeoutError: a replica did not serve it in time.
        """

        async def put(url: str) -> ServedWeights:
            path = SET_WEIGHTS.format(version=version)
            response = await self._http.put(url + path, content=weights.model_dump_json())
            return _read(ServedWeights, response)

        return await self._everywhere(put, timeout_s, f"serve version {version} (trainer.publish.timeout_s)")

    async def rollouts(self, request: RolloutRequest, on_group: Callable[[Group], object], *, timeout_s: float) -> None:
        """Spread `request` over the replicas and call `on_group` with every group as it arrives, each exactly once.

        When a replica fails, only prompts whose groups are missing are asked for again, from the next replica.

        Raises:
            TandemError: a replica refused the request for good.
            TimeoutError: groups are missing after `timeout_s`.
        """
        missing = dict(enumerate(request.prompts))
        begin, self._next_replica = self._next_replica, self._next_replica + len(request.prompts)
        reasons: dict[str, str] = {}

        def take(group: Group) -> None:
            del missing[group.prompt_index]
            on_group(group)

        async def share(first: int, count: int) -> None:
            mine = {index: missing[index] for index in range(first, len(request.prompts), count)}
            pauses = _pauses()
            replica = begin + first
            while mine:
                urls = await self._replicas.now()
                url = urls[replica % len(urls)]
                try:
                    await self._stream(url, request, mine, take)
                except (httpx.TransportError, TandemError) as error:
                    reasons[url] = _retryable(url, error)
                if mine:
                    replica += 1
                    await asyncio.sleep(next(pauses))

        try:
            async with asyncio.timeout(timeout_s), task_group() as tasks:
                count = len(await self._replicas.now())
                for first in range(min(count, len(request.prompts))):
                    tasks.create_task(share(first, count))
        except TimeoutError:
            raise TimeoutError(
                f"{len(missing)} of {len(request.prompts)} groups are missing after {timeout_s:g} s; last troubles: "
                f"{reasons or 'none, the generators are slow'}. Look into the generators' logs, or raise "
                "trainer.rollout.timeout_s."
            ) from None

    async def _stream(
        self, url: str, request: RolloutRequest, mine: dict[int, Prompt], on_group: Callable[[Group], object]
    ) -> None:
        """One try: takes the groups that arrive out of `mine`."""
        asked, trouble = list(mine), "the stream ended early"
        part = request.model_copy(update={"prompts": tuple(mine.values())})
        async with self._http.stream(
            "POST", url + ROLLOUTS, content=part.model_dump_json(), timeout=self._stream_timeout
        ) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
            async for text in _checked(response).aiter_lines():
                group = _group(text)
                if unusable := _unusable(group, request, len(asked)):
                    trouble = unusable
                    continue
                index = asked[group.prompt_index]
                if mine.pop(index, None) is not None:
                    on_group(group.model_copy(update={"prompt_index": index}))
        if mine:
            raise EngineFailed(f"{len(mine)} of {len(asked)} groups are missing: {trouble}")

    async def _ready(self, url: str) -> None:
        response = await self._http.get(url + READYZ)
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            with suppress(ValidationError):  # a proxy's own answer, which says less
                raise EngineFailed(Readiness.model_validate_json(response.content).reason)
        _checked(response)

    async def _info(self, url: str) -> Info:
        return _read(Info, await self._http.get(url + INFO))

    async def _everywhere(
        self, call: Callable[[str], Awaitable[ResultT]], timeout_s: float, purpose: str
    ) -> dict[str, ResultT]:
        """`call` for every replica in parallel, again and again where it fails retryably; the answers by URL.

        A replica that leaves meanwhile is not waited for, one that comes is asked too.
        """
        reasons: dict[str, str] = {}
        urls: set[str] = set()
        done: dict[str, ResultT] = {}

        async def until_done(url: str) -> None:
            pauses = _pauses()
            while url not in done and url in await self._replicas.now():
                try:
                    done[url] = await call(url)
                except (httpx.TransportError, TandemError) as error:
                    reasons[url] = _retryable(url, error)
                    await asyncio.sleep(next(pauses))

        try:
            async with asyncio.timeout(timeout_s):
                while not done.keys() >= (urls := set(await self._replicas.now())):
                    async with task_group() as tasks:
                        for url in urls:
                            tasks.create_task(until_done(url))
        except TimeoutError:
            late = {url: reasons.get(url, "no answer") for url in urls - done.keys()}
            raise TimeoutError(f"waited {timeout_s:g} s for the generators to {purpose}; got {late}") from None
        return {url: done[url] for url in urls}


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first error comes out plain: one cause is what a person can act on."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors.exceptions[0].__cause__


def _pauses() -> Iterator[float]:
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _retryable(url: str, error: httpx.TransportError | TandemError) -> str:
    """Why to try again, for the message at the deadline; raises what will not fix itself."""
    if isinstance(error, TandemError) and not error.retryable:
        raise type(error)(f"{url}: {error}") from error
    return f"{type(error).__name__}: {error}"


def _checked(response: httpx.Response) -> httpx.Response:
    """The response if it is a success.

    Raises:
        TandemError: the one that the body describes; EngineFailed for a server error that speaks another contract.
    """
    if response.is_success:
        return response
    try:
        error = from_body(ErrorBody.model_validate_json(response.content))
    except ValidationError:
        request = response.request
        got = f"{request.method} {request.url.path} answered {response.status_code}: {response.text[:200]}"
        error = EngineFailed(got) if response.is_server_error else TandemError(f"{got}. Is this a Tandem generator?")
    raise error


def _read(kind: type[MessageT], response: httpx.Response) -> MessageT:
    """The message in a success.

    Raises:
        TandemError: as `_checked`, or the message cannot be read.
    """
    try:
        return kind.model_validate_json(_checked(response).content)
    except ValidationError as error:
        request = response.request
        raise TandemError(
            f"{request.method} {request.url.path} answered what this release cannot read: {summarize(error.errors())}. "
            "Fix: run the same release of Tandem on both sides."
        ) from error


def _group(text: str) -> Group:
    """The group in one line of an answer.

    Raises:
        TandemError: the line holds an error.
        LogprobsNotFinite: its logprobs are not numbers.
        EngineFailed: it cannot be read.
    """
    try:
        line = RolloutLine.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors()
        for problem in problems:
            if "logprobs" in problem["loc"] and (problem["type"] == "finite_number" or problem["input"] is None):
                where = ".".join(str(part) for part in problem["loc"])
                raise not_finite(problem["input"], where) from error
        raise EngineFailed(f"a line of the answer cannot be read: {summarize(problems)}") from error
    if line.error is not None:
        raise from_body(line.error)
    if line.group is None:
        raise EngineFailed(f"a line of the answer is {shorten(text)}; expected a group or an error")
    return line.group


def _unusable(group: Group, request: RolloutRequest, asked: int) -> str | None:
    """What is wrong with a group, if anything is."""
    if group.prompt_index >= asked or len(group.completions) != request.sampling.n:
        return (
            f"got a group of {len(group.completions)} completions for prompt {group.prompt_index}, expected "
            f"{request.sampling.n} for one of {asked} prompts"
        )
    if any(completion.finish_reason == "abort" for completion in group.completions):
        return "a completion was aborted, so it is no sample of the policy"
    oldest = min((span.version for c in group.completions for span in c.versions), default=None)
    if request.min_version is not None and oldest is not None and oldest < request.min_version:
        return f"got tokens of version {oldest}, expected {request.min_version} or newer"
    return None
