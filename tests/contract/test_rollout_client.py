"""The client with real generators: it sends what protocol 2 added, and waits for versions without polling."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from support.fake_generators import until
from support.generators import TOKEN
from support.served import PROMPTS, Served
from tandem_protocol.messages import Group, RolloutRequest, Sampling
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient
from tandem_rollout.connections import Connections


class Recorded(Connections):
    """Keeps the requests."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return await super().handle_async_request(request)

    @property
    def paths(self) -> list[str]:
        return [f"{request.method} {request.url.path}" for request in self.requests]

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests if request.method == "POST"]


def asking(version: Version | None = None) -> RolloutRequest:
    prompts = tuple(one.model_copy(update={"session": f"episode {i}"}) for i, one in enumerate(PROMPTS))
    return RolloutRequest(prompts=prompts, sampling=Sampling(n=2, max_tokens=20), min_version=version)


async def test_sessions_and_heartbeats_are_sent_and_every_prompt_is_answered_once(served: Served) -> None:
    transport = Recorded()
    client = GeneratorClient([f"http://127.0.0.1:{served.generator.port}"], TOKEN, transport=transport)
    groups: list[Group] = []
    for _ in range(2):
        await client.rollouts(asking(), groups.append, timeout_s=60)
    await client.close()
    assert sorted(group.prompt_index for group in groups) == [0, 0, 1, 1, 2, 2]
    assert transport.paths == ["GET /info", "POST /rollouts", "POST /rollouts"]
    for body in transport.bodies:
        assert body["heartbeat_s"] > 0
        assert [prompt["session"] for prompt in body["prompts"]] == ["episode 0", "episode 1", "episode 2"]


async def test_a_request_for_a_version_that_comes_later_is_sent_again_when_it_serves(served: Served) -> None:
    transport = Recorded()
    client = GeneratorClient([f"http://127.0.0.1:{served.generator.port}"], TOKEN, transport=transport)
    version = served.next
    groups: list[Group] = []
    asked = asyncio.create_task(client.rollouts(asking(version), groups.append, timeout_s=60))
    await until(lambda: "GET /weights" in transport.paths)
    await asyncio.to_thread(served.switch)
    await asked
    await client.close()
    assert {span.version for group in groups for one in group.completions for span in one.versions} == {version}
    assert len(groups) == len(PROMPTS)
    assert transport.paths == ["GET /info", "POST /rollouts", "GET /weights", "POST /rollouts"]
