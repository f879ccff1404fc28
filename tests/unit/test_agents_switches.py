"""Weights that are switched while an agent talks to the policy: each token keeps the version that sampled it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from support.agents import LosesAnswers, agents, ask, user
from support.episodes import Row, bpe_tokenizer, renderer
from support.mock_engine import SAMPLING, TEMPLATE, Engine, assert_logprobs_are_the_policys
from tandem_rollout.agents import AgentClient
from tandem_rollout.proxy import Proxy
from tandem_rollout.trajectory import Trajectory
from tandem_rollout.turn_sampler import TurnSampler
from tandem_rollout.turns import TurnReader

pytest.importorskip("openai")
LATENCY_S = 0.001
"""Time per token, in which switches can happen."""


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    one = Proxy("policy")
    async with one.serve():
        yield one


async def play(run: Any, proxy: Proxy, generators: Engine, seed: int = 0, *, whole: bool = False) -> Trajectory:
    """Play an episode of an agent with the mock.

    Args:
        whole: each turn has as many tokens as the agent asks for.
    """
    chat = renderer("", chat_template=TEMPLATE, end_of_turn="<pad>")
    player = dataclasses.replace(
        agents(run, proxy, timeout_s=60),
        renderer=chat,
        reader_for=lambda schemas: TurnReader(bpe_tokenizer(), chat, schemas=schemas),
    )
    sampling = SAMPLING.model_copy(update={"ignore_eos": whole})
    sample = TurnSampler(generators, sampling, seed=seed, min_version=None, timeout_s=60)
    trajectory = await player.play(Row(), sample)
    assert trajectory.reason is None
    return trajectory


def steps(trajectory: Trajectory) -> list[list[list[int]]]:
    """The steps of the versions that sampled the tokens, by sequence and turn."""
    return [[one.steps[span.start : span.end] for span in one.sampled] for one in trajectory.sequences]


@pytest.mark.parametrize("stream", [False, True], ids=["whole answers", "streams"])
async def test_a_switch_between_turns_and_one_within_a_turn_are_stamped_from_the_token_on(
    proxy: Proxy, stream: bool
) -> None:
    generators = Engine(token_latency_s=LATENCY_S)

    async def run(row: Any, client: AgentClient) -> None:
        messages = [user("Hi.")]
        for turn in range(4):
            if turn == 1:
                await generators.switch(1)
            switching = asyncio.create_task(generators.switch_after(8, 2) if turn == 2 else asyncio.sleep(0))
            messages += [await answer(client, messages, stream=stream, max_tokens=60), user("Go on.")]
            await switching

    trajectory = await play(run, proxy, generators, whole=True)
    assert_logprobs_are_the_policys(trajectory)
    ((first, second, third, fourth),) = steps(trajectory)
    assert (first, second, fourth) == ([0] * 60, [1] * 60, [2] * 60)
    before = third.count(1)
    assert 8 <= before < 60
    assert third == [1] * before + [2] * (60 - before)


async def answer(client: AgentClient, messages: Any, *, stream: bool, **options: Any) -> dict[str, Any]:
    """Return what the policy says, as a message."""
    asked = await ask(client, messages, **options) if not stream else None
    if asked is not None:
        return {"role": "assistant", "content": asked.choices[0].message.content}
    async with client.openai() as connected:
        chunks = await connected.chat.completions.create(model="any", messages=messages, stream=True, **options)
        texts = [chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices]
    return {"role": "assistant", "content": "".join(texts)}


async def test_sub_agents_in_parallel_keep_their_versions_apart(proxy: Proxy) -> None:
    generators = Engine(token_latency_s=LATENCY_S)

    async def sub_agent(client: AgentClient, name: str) -> None:
        messages = [{"role": "system", "content": name}, user("Hi.")]
        for _ in range(3):
            messages += [await answer(client, messages, stream=False), user("Go on.")]

    async def run(row: Any, client: AgentClient) -> None:
        async def switches() -> None:
            for step in range(1, 1000):
                await generators.switch_after(15, step)

        switching = asyncio.create_task(switches())
        await asyncio.gather(*(sub_agent(client, f"agent {number}") for number in range(3)))
        switching.cancel()

    trajectory = await play(run, proxy, generators)
    assert_logprobs_are_the_policys(trajectory)
    assert [len(turns) for turns in steps(trajectory)] == [3, 3, 3]
    assert any(len(set(turn)) > 1 for turns in steps(trajectory) for turn in turns)
    assert len({step for turns in steps(trajectory) for turn in turns for step in turn}) > 2


async def test_a_call_that_is_retried_after_a_switch_gets_the_answer_of_the_old_version(proxy: Proxy) -> None:
    generators = Engine()

    class SwitchesAndLoses(LosesAnswers):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            try:
                return await super().handle_async_request(request)
            except httpx.ReadError:
                await generators.switch(1)
                raise

    async def run(row: Any, client: AgentClient) -> None:
        http = httpx.AsyncClient(transport=SwitchesAndLoses(1))
        async with client.openai(http_client=http, max_retries=3) as connected:
            one = await connected.chat.completions.create(model="any", messages=[user("Hi.")])
            asked = [user("Hi."), one.choices[0].message, user("Go on.")]
            await connected.chat.completions.create(model="any", messages=asked)

    trajectory = await play(run, proxy, generators)
    assert_logprobs_are_the_policys(trajectory)
    assert [set(turn) for turns in steps(trajectory) for turn in turns] == [{0}, {1}]
