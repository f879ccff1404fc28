"""A request that needs a version waits for it without polling, and goes where it is served."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest

from support.fake_generators import DESCRIPTION, URLS, V1, answer, groups, sample, turn, until
from tandem_protocol.errors import StalePolicy
from tandem_protocol.messages import ServedWeights
from tandem_protocol.routes import INFO, WEIGHTS
from tandem_protocol.version import Version
from tandem_rollout import awaited_versions
from tandem_rollout.client import GeneratorClient

pytestmark = pytest.mark.usefixtures("names")


class Fleet:
    """Replicas that serve a version when a test says so."""

    def __init__(self, *serving: str) -> None:
        self.serving = set(serving)
        self.switched = asyncio.Event()
        self.sampled: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.waited: Counter[str] = Counter()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        if request.url.path == INFO:
            return httpx.Response(200, content=DESCRIPTION.model_dump_json())
        if request.url.path == WEIGHTS:
            self.waited[host] += 1
            assert request.url.params["at_least"] == str(V1)
            assert float(request.url.params["wait_s"]) > 0
            while host not in self.serving:
                await self.switched.wait()
                await asyncio.sleep(0)
            return httpx.Response(200, content=ServedWeights(version=V1, manifest_digest="a").model_dump_json())
        if host not in self.serving:
            self.refused[host] += 1
            error = StalePolicy("serves 0.1")
            return httpx.Response(error.status, content=error.body.model_dump_json())
        self.sampled[host] += 1
        return answer(*groups(request))

    def client(self) -> GeneratorClient:
        return GeneratorClient(URLS, None, transport=httpx.MockTransport(self))


async def test_all_calls_that_wait_for_a_version_share_one_question_per_replica() -> None:
    fleet = Fleet()
    client = fleet.client()
    calls = [asyncio.create_task(sample(client, turn())) for _ in range(100)]
    await until(lambda: fleet.waited.total() == 2)
    calls += [asyncio.create_task(sample(client, turn())) for _ in range(100)]
    for _ in range(50):
        await asyncio.sleep(0)
    before = fleet.refused.total()
    fleet.serving.update(("replica0", "replica1"))
    fleet.switched.set()
    assert [len(got) for got in await asyncio.gather(*calls)] == [1] * 200
    assert fleet.waited == {"replica0": 1, "replica1": 1}
    assert fleet.refused.total() == before <= 200, "calls that came later asked nobody"


async def test_whoever_publishes_learns_that_a_replica_serves_an_older_version_than_a_request_needs() -> None:
    fleet, needed = Fleet(), []
    client = fleet.client()

    def send_again(version: Version) -> None:
        needed.append(version)
        fleet.serving.update(("replica0", "replica1"))
        fleet.switched.set()

    client.on_stale = send_again
    assert len(await sample(client, turn())) == 1
    assert needed == [V1]


async def test_calls_ask_nobody_for_a_version_that_is_on_its_way() -> None:
    fleet = Fleet()
    client = fleet.client()
    await client.info(60)
    await client.expect(V1)
    calls = [asyncio.create_task(sample(client, turn())) for _ in range(20)]
    await until(lambda: fleet.waited.total() == 2)
    for _ in range(50):
        await asyncio.sleep(0)
    fleet.serving.update(("replica0", "replica1"))
    fleet.switched.set()
    assert [len(got) for got in await asyncio.gather(*calls)] == [1] * 20
    assert (fleet.refused, fleet.waited.total()) == ({}, 2)
    await client.close()


async def test_prompts_go_to_the_replicas_that_serve_the_version_already() -> None:
    fleet = Fleet("replica1")
    client = fleet.client()
    for _ in range(20):
        assert len(await sample(client, turn())) == 1
    assert fleet.sampled == {"replica1": 20}
    assert fleet.refused == {"replica0": 1}
    fleet.serving.add("replica0")
    fleet.switched.set()
    for _ in range(10):
        await asyncio.sleep(0)
    for _ in range(20):
        await sample(client, turn())
    assert fleet.sampled["replica0"] == 10
    await client.close()


async def test_a_call_that_waits_for_a_version_ends_at_its_deadline() -> None:
    client = Fleet().client()
    with pytest.raises(TimeoutError, match=r"1 of 1 groups are missing.*replica0.*StalePolicy: serves 0\.1"):
        await sample(client, turn(), timeout_s=0.2)
    await client.close()


async def test_a_version_on_its_way_is_waited_for_outside_the_deadline_until_the_first_replica_serves_it() -> None:
    fleet = Fleet()
    client = fleet.client()
    await client.info(60)
    await client.until_served(V1, timeout_s=60)
    assert fleet.waited.total() == 0, "it is not on its way"
    await client.expect(V1)
    waiting = [asyncio.create_task(client.until_served(V1, timeout_s=60)) for _ in range(20)]
    await until(lambda: fleet.waited.total() == 2)
    for _ in range(50):
        await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    fleet.serving.add("replica1")
    fleet.switched.set()
    await asyncio.gather(*waiting)
    await client.until_served(V1, timeout_s=60)
    assert fleet.waited == {"replica0": 1, "replica1": 1}, "they share the questions"
    await client.close()


async def test_a_replica_that_cannot_say_when_it_serves_a_version_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(awaited_versions, "PAUSE_S", 0.001)
    fleet = Fleet("replica0")
    fails = 3

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal fails
        if request.url.path == WEIGHTS and fails:
            fails -= 1
            return httpx.Response(StalePolicy.status, content=StalePolicy("serves 0.1").body.model_dump_json())
        return await fleet(request)

    client = GeneratorClient(URLS[:1], None, transport=httpx.MockTransport(answer))
    await client.info(60)
    await client.expect(V1)
    await client.until_served(V1, timeout_s=60)
    assert fleet.waited == {"replica0": 1}
    await client.close()


async def test_a_version_that_never_comes_is_waited_for_once() -> None:
    fleet = Fleet()
    client = fleet.client()
    await client.info(60)
    await client.expect(V1)
    await client.until_served(V1, timeout_s=0.01)
    await client.until_served(V1, timeout_s=3600)
    await client.close()
