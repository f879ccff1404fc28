"""Generators whose answers a test decides, without a network."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from support.rollouts import completion
from tandem_protocol.messages import (
    PROTOCOL_VERSION,
    Group,
    Info,
    ModelFingerprint,
    Progress,
    Prompt,
    RolloutLine,
    RolloutRequest,
    Sampling,
    ServedWeights,
)
from tandem_protocol.routes import INFO
from tandem_protocol.version import BASE, Version
from tandem_rollout.client import GeneratorClient

DESCRIPTION = Info(
    generator_id="g",
    engine="mock",
    engine_version="1",
    model="m",
    fingerprint=ModelFingerprint(),
    version=BASE,
    devices=(),
    world_size=1,
    max_model_len=32,
    max_num_seqs=1,
)
Handler = Callable[[httpx.Request], Any]


def speaking(handler: Handler, protocol: int = PROTOCOL_VERSION) -> httpx.MockTransport:
    """Return a transport that describes itself with this version of the contract, and asks `handler` to sample.

    A question when a version serves is answered at once: it does.
    """

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == INFO:
            description = DESCRIPTION.model_copy(update={"protocol": protocol})
            return httpx.Response(200, content=description.model_dump_json())
        if "at_least" in request.url.params:
            served = ServedWeights(version=Version.parse(request.url.params["at_least"]), manifest_digest="abc")
            return httpx.Response(200, content=served.model_dump_json())
        response = handler(request)
        given: httpx.Response = await response if inspect.isawaitable(response) else response
        return given

    return httpx.MockTransport(answer)


V1 = Version(1, 1)
URLS = ("http://replica0", "http://replica1")


def asking(*prompts: Prompt, max_tokens: int = 4) -> RolloutRequest:
    """A request that needs version `V1`."""
    return RolloutRequest(prompts=prompts, sampling=Sampling(max_tokens=max_tokens), min_version=V1)


def turn(session: str | None = None, token: int = 5) -> RolloutRequest:
    """A turn of an episode, with one token."""
    return asking(Prompt(token_ids=(token,), session=session))


def groups(request: httpx.Request) -> list[RolloutLine]:
    """One group for each prompt of the request. The completion has the tokens of the prompt."""
    prompts = json.loads(request.content)["prompts"]
    made = [Group(prompt_index=i, completions=(completion(p["token_ids"], version=V1),)) for i, p in enumerate(prompts)]
    return [RolloutLine(group=group) for group in made]


def beat(tokens: int) -> RolloutLine:
    """A heartbeat."""
    return RolloutLine(progress=Progress(tokens=tokens))


def answer(*lines: RolloutLine) -> httpx.Response:
    """A complete answer."""
    return httpx.Response(200, text="".join(line.model_dump_json(exclude_none=True) + "\n" for line in lines))


class Lines(httpx.AsyncByteStream):
    """A body of lines. Other items are functions that are called in between."""

    def __init__(self, *items: RolloutLine | Callable[[], Awaitable[object]]) -> None:
        self._items = items

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for item in self._items:
            if isinstance(item, RolloutLine):
                yield item.model_dump_json(exclude_none=True).encode() + b"\n"
            else:
                await item()


async def sample(client: GeneratorClient, request: RolloutRequest, timeout_s: float = 20) -> list[Group]:
    """Request rollouts, and return the groups in the order in which they came."""
    got: list[Group] = []
    await client.rollouts(request, got.append, timeout_s=timeout_s)
    return got


async def until(condition: Callable[[], object]) -> None:
    """Let other tasks run until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - tests have no event for everything
            await asyncio.sleep(0.001)


def make(handler: Any, *, urls: tuple[str, ...] = URLS, **settings: Any) -> GeneratorClient:
    """A client of replicas that speak the newest version, and that `handler` answers for."""
    return GeneratorClient(urls, None, transport=speaking(handler), **settings)
