"""A call is recorded once, whatever the network and the client's library do."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from support.agents import LosesAnswers, agents, ask, assert_trains_what_the_policy_said, user
from support.episodes import Policy, Row
from tandem_protocol.errors import EngineFailed
from tandem_rollout.agents import AgentClient
from tandem_rollout.errors import UserError
from tandem_rollout.proxy import Proxy

openai = pytest.importorskip("openai")


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    one = Proxy("policy")
    async with one.serve():
        yield one


async def test_a_retried_call_is_answered_again_and_recorded_once(proxy: Proxy) -> None:
    async def run(row: Any, client: AgentClient) -> None:
        http = httpx.AsyncClient(transport=LosesAnswers(1))
        async with client.openai(http_client=http, max_retries=3) as connected:
            answer = await connected.chat.completions.create(model="any", messages=[user("Hi.")])
            asked = [user("Hi."), answer.choices[0].message, user("And?")]
            await connected.chat.completions.create(model="any", messages=asked)

    policy = Policy("One.", "Two.")
    trajectory = await agents(run, proxy).play(Row(), policy)
    assert trajectory.reason is None
    assert len(policy.calls) == trajectory.turns == 2
    assert len(trajectory.sequences) == 1
    assert_trains_what_the_policy_said(trajectory, policy)


async def test_the_same_question_asked_twice_is_sampled_twice(proxy: Proxy) -> None:
    """This is not a retry: an agent may take the best of several answers."""

    async def run(row: Any, client: AgentClient) -> None:
        for _ in range(2):
            await ask(client, [user("Hi.")])

    policy = Policy("One.", "Two.")
    trajectory = await agents(run, proxy).play(Row(), policy)
    assert len(trajectory.sequences) == 2
    assert_trains_what_the_policy_said(trajectory, policy)


async def test_a_client_that_disconnects_cancels_sampling_and_leaves_no_trace(proxy: Proxy) -> None:
    events: list[str] = []
    policy = Policy("One.")

    async def slow(prompt_ids: Any, *, max_tokens: int, turn: int) -> Any:
        if turn:
            return await policy(prompt_ids, max_tokens=max_tokens, turn=turn)
        events.append("sampling")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    async def run(row: Any, client: AgentClient) -> None:
        try:
            await ask(client, [user("Hi.")], timeout=0.3)
        except openai.APITimeoutError:
            raise AssertionError("the library gave up") from None

    trajectory = await agents(run, proxy).play(Row(), slow)
    assert trajectory.reason is None
    assert events == ["sampling", "cancelled"]
    assert (trajectory.turns, len(policy.calls)) == (1, 1)
    assert_trains_what_the_policy_said(trajectory, policy)


async def test_calls_that_an_agent_does_not_wait_for_are_cancelled_at_its_end(proxy: Proxy) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def slow(*_: Any, **__: Any) -> Any:
        started.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    left: list[Any] = []

    async def run(row: Any, client: AgentClient) -> None:
        left.append(asyncio.create_task(ask(client, [user("Hi.")])))
        await started.wait()

    trajectory = await agents(run, proxy).play(Row(), slow)
    async with asyncio.timeout(60):
        await cancelled.wait()
    assert (trajectory.status, trajectory.turns, trajectory.sequences) == ("finished", 0, ())
    await asyncio.gather(*left, return_exceptions=True)


async def test_an_error_of_the_generators_is_not_the_agents(proxy: Proxy) -> None:
    calls = []

    async def sample(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise EngineFailed("out of memory")

    async def run(row: Any, client: AgentClient) -> float:
        await ask(client, [user("Hi.")])
        return 1.0

    with pytest.raises(EngineFailed, match="out of memory"):
        await agents(run, proxy).play(Row(), sample)
    assert calls == [1]  # the library does not retry


async def test_a_wrong_key_and_an_episode_that_is_over_are_refused(proxy: Proxy) -> None:
    kept: list[AgentClient] = []

    async def run(row: Any, client: AgentClient) -> None:
        kept.append(client)
        async with client.openai() as connected:
            assert [model.id async for model in await connected.models.list()] == ["policy"]
        wrong = AgentClient(client.base_url, "wrong", client.model)
        with pytest.raises(openai.AuthenticationError):
            await ask(wrong, [user("Hi.")])

    policy = Policy("One.")
    assert (await agents(run, proxy).play(Row(), policy)).reason is None
    with pytest.raises(openai.NotFoundError, match="the episode may be over"):
        await ask(kept[0], [user("Hi.")])
    assert policy.calls == []


async def test_a_call_whose_body_arrives_after_the_episode_is_refused(proxy: Proxy) -> None:
    policy = Policy("One.")
    answers: list[httpx.Response] = []
    over = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"messages": '
        await over.wait()
        yield b'[{"role": "user", "content": "Hi."}]}'

    async def late(client: AgentClient) -> None:
        headers = {"Authorization": f"Bearer {client.api_key}"}
        async with httpx.AsyncClient(headers=headers, timeout=60) as http:
            answers.append(await http.post(f"{client.base_url}/chat/completions", content=body()))

    left: list[Any] = []

    async def run(row: Any, client: AgentClient) -> None:
        left.append(asyncio.create_task(late(client)))
        await asyncio.sleep(0.1)  # its headers arrive

    assert (await agents(run, proxy).play(Row(), policy)).turns == 0
    over.set()
    await asyncio.gather(*left)
    assert (answers[0].status_code, policy.calls) == (404, [])


async def test_an_error_of_the_tool_parser_is_not_the_agents(proxy: Proxy) -> None:
    class Broken:
        def read(self, *_: Any) -> Any:
            raise UserError("tool parser project:parse has an error. Fix: correct the parser.")

    async def run(row: Any, client: AgentClient) -> float:
        await ask(client, [user("Hi.")])
        return 1.0

    one = dataclasses.replace(agents(run, proxy), reader_for=lambda schemas: Broken())  # type: ignore[arg-type,return-value]  # it reads no turn
    with pytest.raises(UserError, match="correct the parser"):
        await one.play(Row(), Policy("One."))
