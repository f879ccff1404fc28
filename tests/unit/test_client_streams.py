"""Sessions, load and heartbeats: what the client does with replicas of each version of the contract."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from support.fake_generators import (
    DESCRIPTION,
    URLS,
    Lines,
    answer,
    asking,
    beat,
    groups,
    make,
    sample,
    turn,
    until,
)
from tandem_protocol.errors import EngineFailed
from tandem_protocol.messages import Prompt, RolloutLine
from tandem_protocol.routes import INFO
from tandem_rollout import streams
from tandem_rollout.client import GeneratorClient

pytestmark = pytest.mark.usefixtures("names")

STALL_S = 60.0


# -- sessions and load ---------------------------------------------------------------------------------------------


async def test_the_turns_of_an_episode_go_to_one_replica_and_episodes_are_spread() -> None:
    hosts: dict[str, Counter[str]] = {}

    async def handler(request: httpx.Request) -> httpx.Response:
        (prompt,) = json.loads(request.content)["prompts"]
        hosts.setdefault(prompt["session"], Counter())[request.url.host] += 1
        await asyncio.sleep(0)
        return answer(*groups(request))

    client = make(handler)

    async def episode(name: str) -> None:
        for _ in range(4):
            await sample(client, turn(name))

    await asyncio.gather(*(episode(f"episode {number}") for number in range(20)))
    assert all(list(used.values()) == [4] for used in hosts.values())
    assert Counter(host for used in hosts.values() for host in used) == {"replica0": 10, "replica1": 10}


async def test_an_episode_goes_on_elsewhere_if_its_replica_dies() -> None:
    hosts: list[str] = []
    dead: set[str] = set()

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.host in dead:
            raise httpx.ConnectError("refused")
        hosts.append(request.url.host)
        return answer(*groups(request))

    client = make(handler)
    for number in range(6):
        if number == 3:
            dead.add(hosts[0])
        await sample(client, turn("episode"))
    assert hosts == ["replica0"] * 3 + ["replica1"] * 3


async def test_a_replica_that_does_not_answer_gets_no_further_prompts() -> None:
    hosts: list[str] = []

    async def handler(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        if request.url.host == "replica0":
            await asyncio.Event().wait()
        return answer(*groups(request))

    client = make(handler)
    hangs = asyncio.create_task(sample(client, asking(Prompt(token_ids=(1,)), max_tokens=1000)))
    await until(lambda: hosts)
    for _ in range(20):
        await sample(client, turn())
    assert Counter(hosts) == {"replica0": 1, "replica1": 20}
    hangs.cancel()


async def test_a_thousand_calls_at_once_are_answered_once_each_and_evenly_divided() -> None:
    hosts: Counter[str] = Counter()

    async def handler(request: httpx.Request) -> httpx.Response:
        hosts[request.url.host] += 1
        await asyncio.sleep(0)
        return answer(*groups(request))

    client = make(handler)
    got = await asyncio.gather(*(sample(client, turn(token=number)) for number in range(1000)))
    assert [group.completions[0].token_ids for (group,) in got] == [(number,) for number in range(1000)]
    assert hosts == {"replica0": 500, "replica1": 500}


# -- what older generators get -------------------------------------------------------------------------------------


async def test_each_replica_gets_only_what_it_understands() -> None:
    bodies: dict[str, dict[str, Any]] = {}

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == INFO:
            old = request.url.host == "replica1"
            info = DESCRIPTION.model_copy(update={"protocol": 1 if old else 2})
            return httpx.Response(200, content=info.model_dump_json())
        bodies[request.url.host] = json.loads(request.content)
        return answer(*groups(request))

    client = GeneratorClient(URLS, None, transport=httpx.MockTransport(handler))
    await sample(client, asking(*(Prompt(token_ids=(i,), session=f"episode {i}") for i in range(4))))
    assert bodies["replica0"]["heartbeat_s"] > 0
    assert [prompt["session"] for prompt in bodies["replica0"]["prompts"]] == ["episode 0", "episode 2"]
    assert bodies["replica1"].keys() == {"prompts", "sampling", "min_version"}
    assert [prompt.keys() for prompt in bodies["replica1"]["prompts"]] == [{"token_ids"}] * 2


async def test_a_replica_that_comes_back_with_an_older_release_is_asked_again() -> None:
    asked: list[int] = []
    broken = [False, True, False]
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == INFO:
            asked.append(2 - len(asked))
            return httpx.Response(200, json={"protocol": asked[-1]})
        bodies.append(json.loads(request.content))
        if broken[len(bodies) - 1]:
            raise httpx.ReadError("connection reset")
        return answer(*groups(request))

    client = GeneratorClient(URLS[:1], None, transport=httpx.MockTransport(handler))
    for _ in range(2):
        await sample(client, turn("episode"))
    assert asked == [2, 1]
    assert ["heartbeat_s" in body for body in bodies] == [True, True, False]


@pytest.mark.parametrize(
    "info",
    [httpx.Response(404, text="no"), httpx.Response(200, text="<html>"), httpx.Response(200, json=[])],
    ids=["missing", "html", "list"],
)
async def test_a_replica_that_cannot_be_understood_gets_the_oldest_contract(info: httpx.Response) -> None:
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == INFO:
            return info
        bodies.append(json.loads(request.content))
        return answer(*groups(request))

    client = GeneratorClient(URLS[:1], None, transport=httpx.MockTransport(handler))
    await sample(client, turn("episode"))
    assert "heartbeat_s" not in bodies[0]


async def test_many_calls_ask_a_replica_once_what_it_speaks() -> None:
    asked = 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        if request.url.path == INFO:
            asked += 1
            await asyncio.sleep(0.01)
            return httpx.Response(200, json={"protocol": 2})
        return answer(*groups(request))

    client = GeneratorClient(URLS[:1], None, transport=httpx.MockTransport(handler))
    await asyncio.gather(*(sample(client, turn()) for _ in range(50)))
    assert asked == 1


# -- heartbeats ----------------------------------------------------------------------------------------------------


class Passing:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def after(self, seconds: float) -> Callable[[], Awaitable[None]]:
        async def wait() -> None:
            self.now_s += seconds

        return wait


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Passing:
    clock = Passing()
    monkeypatch.setattr(streams, "clock", clock)
    return clock


async def test_a_group_may_take_longer_than_a_stall_if_its_tokens_grow(passing: Passing) -> None:
    hosts: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        slow = [item for tokens in range(1, 20) for item in (passing.after(STALL_S * 0.9), beat(tokens))]
        return httpx.Response(200, stream=Lines(*slow, *groups(request)))

    assert len(await sample(make(handler, stall_timeout_s=STALL_S), turn())) == 1
    assert hosts == ["replica0"]


@pytest.mark.parametrize("first", [0, 7])
async def test_a_replica_without_new_tokens_is_left_and_what_it_had_finished_is_kept(
    passing: Passing, first: int
) -> None:
    requested: list[tuple[str, int]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        made = groups(request)
        requested.append((request.url.host, len(made)))
        if request.url.host == "replica1":
            return answer(*made)
        hanging = [item for _ in range(3) for item in (passing.after(STALL_S * 0.6), beat(first))]
        never = asyncio.Event().wait
        return httpx.Response(200, stream=Lines(beat(first), made[0], *hanging, never))

    client = make(handler, stall_timeout_s=STALL_S)
    prompts = [Prompt(token_ids=(i,)) for i in range(6)]
    got = await sample(client, asking(*prompts))
    assert sorted(group.completions[0].token_ids[0] for group in got) == list(range(6))
    assert sorted(requested) == [("replica0", 3), ("replica1", 2), ("replica1", 3)]


async def test_a_request_that_waits_for_its_turn_is_not_a_stall(passing: Passing) -> None:
    """The replica samples for others. More replicas would not make it faster, and it would begin at the end again."""
    requested: list[int] = []
    waits, works, heard = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def handler(request: httpx.Request) -> httpx.Response:
        (group,) = groups(request)
        token = group.group.completions[0].token_ids[0] if group.group else -1
        requested.append(token)
        if token == 1:
            busy = [item for tokens in range(1, 6) for item in (passing.after(STALL_S * 0.9), beat(tokens))]
            return httpx.Response(200, stream=Lines(waits.wait, *busy, _set(works), heard.wait, group))
        return httpx.Response(200, stream=Lines(beat(0), _set(waits), works.wait, beat(0), _set(heard), group))

    client = make(handler, urls=URLS[:1], stall_timeout_s=STALL_S)
    await asyncio.gather(sample(client, turn(token=1)), sample(client, turn(token=2)))
    assert sorted(requested) == [1, 2]


def _set(event: asyncio.Event) -> Callable[[], Awaitable[None]]:
    async def call() -> None:
        event.set()

    return call


async def test_the_error_at_the_deadline_says_that_the_engine_hangs(passing: Passing) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Lines(beat(3), passing.after(2 * STALL_S), beat(3)))

    with pytest.raises(TimeoutError, match=r"replica0.*no new token for 120\.0 s \(trainer\.rollout\."):
        await sample(make(handler, urls=URLS[:1], stall_timeout_s=STALL_S), turn(), timeout_s=0.2)


async def test_an_engine_error_line_is_retried_elsewhere_under_protocol_2() -> None:
    hosts: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        if len(hosts) == 1:
            return answer(beat(2), RolloutLine(error=EngineFailed("died").body))
        return answer(*groups(request))

    assert len(await sample(make(handler), turn("episode"))) == 1
    assert hosts == ["replica0", "replica1"]
