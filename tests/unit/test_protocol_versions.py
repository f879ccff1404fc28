"""Trainer and generator of releases that speak different versions of the wire contract."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from support.fake_generators import DESCRIPTION, speaking
from support.rollouts import completion
from tandem_protocol.errors import BadRequest
from tandem_protocol.messages import (
    PROTOCOL_VERSION,
    Group,
    ModelFingerprint,
    Prompt,
    RolloutLine,
    RolloutRequest,
    Sampling,
)
from tandem_rollout.client import GeneratorClient
from tandem_rollout.handshake import check_generators

REQUEST_KEYS_1 = {"prompts", "sampling", "min_version"}
PROMPT_KEYS_1 = {"token_ids", "seed"}
SAMPLING_KEYS_1 = {
    *("n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids"),
    "ignore_eos",
}


@pytest.mark.usefixtures("names")
async def test_the_client_names_its_newest_version() -> None:
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params.get("protocol"))
        return httpx.Response(200, content=DESCRIPTION.model_dump_json())

    client = GeneratorClient(["http://127.0.0.1:1"], None, transport=httpx.MockTransport(answer))
    await client.info(5)
    await client.close()
    assert asked == [str(PROTOCOL_VERSION)]


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("seed", [None, 7])
async def test_a_generator_of_version_1_gets_no_key_that_it_refuses(seed: int | None) -> None:
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        line = RolloutLine(group=Group(prompt_index=0, completions=(completion([3]),)))
        return httpx.Response(200, content=line.model_dump_json(exclude_none=True))

    client = GeneratorClient(["http://127.0.0.1:1"], None, transport=speaking(answer, protocol=1))
    request = RolloutRequest(
        prompts=(Prompt(token_ids=(5,), seed=seed, session="episode 7"),), sampling=Sampling(max_tokens=1)
    )
    groups: list[Group] = []
    await client.rollouts(request, groups.append, timeout_s=5)
    await client.close()
    (body,) = bodies
    assert len(groups) == 1
    assert body.keys() <= REQUEST_KEYS_1
    assert body["prompts"][0].keys() <= PROMPT_KEYS_1
    assert body["sampling"].keys() <= SAMPLING_KEYS_1
    unnamed = Prompt(token_ids=(5,), seed=seed)
    assert RolloutRequest.model_validate(body) == request.model_copy(update={"prompts": (unnamed,)})


@pytest.mark.usefixtures("names")
async def test_the_oldest_version_is_that_of_the_replicas_that_have_been_asked() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        spoken = 1 if request.url.port == 2 else PROTOCOL_VERSION
        return httpx.Response(200, content=DESCRIPTION.model_copy(update={"protocol": spoken}).model_dump_json())

    urls = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    client = GeneratorClient(urls, None, transport=httpx.MockTransport(answer))
    assert client.protocols.oldest == PROTOCOL_VERSION
    await client.info(5)
    assert client.protocols.oldest == 1
    client.protocols.forget(urls[1])
    assert client.protocols.oldest == 1, "until it answers again, it speaks what it has said"
    await client.close()


@pytest.mark.parametrize("protocol", range(1, PROTOCOL_VERSION + 1))
def test_a_generator_of_every_version_that_this_release_speaks_is_accepted(protocol: int) -> None:
    info = DESCRIPTION.model_copy(update={"protocol": protocol})
    ours = ModelFingerprint()
    assert check_generators([info], ["http://a"], ours=ours, model="m", max_completion_length=16, accelerators=()) == 32


@pytest.mark.usefixtures("names")
async def test_a_version_is_asked_for_again_after_an_answer_that_a_proxy_gave() -> None:
    """A generator behind a proxy restarts: the proxy answers for it once, and that says nothing about its release."""
    bodies: list[dict[str, Any]] = []
    descriptions = iter([httpx.Response(502, text="Bad Gateway")])

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            return next(descriptions, httpx.Response(200, content=DESCRIPTION.model_dump_json()))
        bodies.append(json.loads(request.content))
        line = RolloutLine(group=Group(prompt_index=0, completions=(completion([3]),)))
        return httpx.Response(200, content=line.model_dump_json(exclude_none=True))

    client = GeneratorClient(["http://127.0.0.1:1"], None, transport=httpx.MockTransport(answer))
    request = RolloutRequest(prompts=(Prompt(token_ids=(5,)),), sampling=Sampling(max_tokens=1))
    await client.rollouts(request, lambda _: None, timeout_s=60)
    await client.close()
    assert ["heartbeat_s" in body for body in bodies] == [True]


@pytest.mark.usefixtures("names")
async def test_an_older_release_that_takes_the_place_of_a_generator_unseen_gets_what_it_understands() -> None:
    """Between two requests no connection is open, so nothing else tells the client."""
    speaks = [PROTOCOL_VERSION]

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            return httpx.Response(200, content=DESCRIPTION.model_copy(update={"protocol": speaks[0]}).model_dump_json())
        if speaks == [1] and "heartbeat_s" in json.loads(request.content):
            error = BadRequest("heartbeat_s: Extra inputs are not permitted")
            return httpx.Response(error.status, content=error.body.model_dump_json())
        line = RolloutLine(group=Group(prompt_index=0, completions=(completion([3]),)))
        return httpx.Response(200, content=line.model_dump_json(exclude_none=True))

    client = GeneratorClient(["http://127.0.0.1:1"], None, transport=httpx.MockTransport(answer))
    request = RolloutRequest(prompts=(Prompt(token_ids=(5,)),), sampling=Sampling(max_tokens=1))
    groups: list[Group] = []
    for speaks[0] in (PROTOCOL_VERSION, 1):
        await client.rollouts(request, groups.append, timeout_s=60)
    await client.close()
    assert len(groups) == 2


@pytest.mark.usefixtures("names")
async def test_requests_that_are_refused_after_the_new_version_is_known_are_sent_again() -> None:
    """Several requests were under way when the older release took the place of the generator."""
    speaks = [PROTOCOL_VERSION]
    under_way, known = asyncio.Event(), asyncio.Event()
    refused: list[httpx.Request] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            return httpx.Response(200, content=DESCRIPTION.model_copy(update={"protocol": speaks[0]}).model_dump_json())
        if speaks == [1] and "heartbeat_s" in json.loads(request.content):
            refused.append(request)
            if len(refused) == 3:
                under_way.set()
            await (under_way if refused[0] is request else known).wait()  # the other refusals come late
            error = BadRequest("heartbeat_s: Extra inputs are not permitted")
            return httpx.Response(error.status, content=error.body.model_dump_json())
        if speaks == [1]:
            known.set()
        line = RolloutLine(group=Group(prompt_index=0, completions=(completion([3]),)))
        return httpx.Response(200, content=line.model_dump_json(exclude_none=True))

    client = GeneratorClient(["http://127.0.0.1:1"], None, transport=httpx.MockTransport(answer))
    request = RolloutRequest(prompts=(Prompt(token_ids=(5,)),), sampling=Sampling(max_tokens=1))
    groups: list[Group] = []
    await client.rollouts(request, groups.append, timeout_s=60)
    speaks[0] = 1
    await asyncio.gather(*(client.rollouts(request, groups.append, timeout_s=60) for _ in range(3)))
    await client.close()
    assert len(refused) == 3
    assert len(groups) == 4
