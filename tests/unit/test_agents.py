"""What an agent's calls sample is recorded exactly once, whatever the agent, its library and the network do."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from support.agents import ADD, NAME, agents, ask, assert_trains_what_the_policy_said, user
from support.episodes import Policy, Row, called, completion, renderer
from tandem_protocol.messages import Completion
from tandem_rollout.agents import AgentClient
from tandem_rollout.proxy import Proxy
from tandem_rollout.trajectory import Trajectory

openai = pytest.importorskip("openai")


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    one = Proxy("policy")
    async with one.serve():
        yield one


async def test_an_agent_with_tools_is_one_sequence(proxy: Proxy) -> None:
    async def run(row: dict[str, Any], client: AgentClient) -> float:
        messages = [user(row["prompt"])]
        answer = await ask(client, messages, tools=[ADD], temperature=0.3, seed=1)
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
        assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("tool_calls", "Let me see. ")
        messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "3"}]
        answer = await ask(client, messages, tools=[ADD])
        assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", "It is 3.")
        assert answer.usage.completion_tokens == len(policy.calls[1][1].token_ids)
        return 0.5

    policy = Policy("Let me see. " + called("add", a=1), "It is 3.")
    trajectory = await agents(run, proxy).play(Row("What is 1+2?"), policy)
    assert trajectory.reason is None
    assert (trajectory.status, trajectory.reward, trajectory.rewards) == ("finished", 0.5, {"agent": 0.5})
    assert (trajectory.turns, trajectory.tool_calls, len(trajectory.sequences)) == (2, 1, 1)
    assert_trains_what_the_policy_said(trajectory, policy)
    assert [m["role"] for m in trajectory.messages] == ["user", "assistant", "tool", "assistant"]
    assert [m["role"] for m in trajectory.prompt] == ["user"]
    assert Trajectory.model_validate_json(trajectory.model_dump_json()) == trajectory


async def test_a_streamed_answer_is_the_same_answer(proxy: Proxy) -> None:
    async def run(row: Any, client: AgentClient) -> None:
        async with client.openai() as connected:
            stream = await connected.chat.completions.create(
                model="any", messages=[user("Hi.")], tools=[ADD], stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        assert "".join(delta.content or "" for delta in deltas) == "So: "
        (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
        assert (call.index, call.function.name) == (0, "add")
        assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, "tool_calls"]
        assert chunks[-1].usage.completion_tokens == len(policy.calls[0][1].token_ids)

    policy = Policy("So: " + called("add", a=1))
    trajectory = await agents(run, proxy).play(Row(), policy)
    assert trajectory.reason is None
    assert_trains_what_the_policy_said(trajectory, policy)


async def test_sub_agents_in_parallel_are_sequences_of_one_episode(proxy: Proxy) -> None:
    async def sub_agent(client: AgentClient, name: str) -> str:
        messages = [{"role": "system", "content": name}, user("Hi.")]
        for _ in range(3):
            answer = await ask(client, messages)
            messages += [answer.choices[0].message, user("Go on.")]
        return str(answer.choices[0].message.content)

    async def run(row: Any, client: AgentClient) -> float:
        await asyncio.gather(*(sub_agent(client, f"agent {i}") for i in range(4)))
        return 1.0

    policy = Policy("I think so, yes.")
    trajectory = await agents(run, proxy).play(Row(), policy)
    assert trajectory.reason is None
    assert [len(sequence.sampled) for sequence in trajectory.sequences] == [3] * 4
    assert_trains_what_the_policy_said(trajectory, policy)


async def test_a_synchronous_agent_runs_in_a_thread(proxy: Proxy) -> None:
    def run(row: Any, client: AgentClient) -> float:
        with openai.OpenAI(base_url=client.base_url, api_key=client.api_key) as connected:
            answer = connected.chat.completions.create(model="any", messages=[user("Hi.")])
            return float(answer.choices[0].message.content)

    assert (await agents(run, proxy).play(Row(), Policy("0.25"))).reward == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}}, "got tool_choice {'type'"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"n": 2}, "got n: 2, expected 1"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "not text"),
        ({"messages": [{"content": "x"}]}, "expected an object with a role"),
    ],
)
async def test_what_cannot_be_trained_is_refused_with_the_reason(
    proxy: Proxy, options: dict[str, Any], message: str
) -> None:
    async def run(row: Any, client: AgentClient) -> None:
        with pytest.raises(openai.BadRequestError, match=message):
            await ask(client, **({"messages": [user("Hi.")]} | options))

    policy = Policy("One.")
    trajectory = await agents(run, proxy).play(Row(), policy)
    assert trajectory.reason is None
    assert policy.calls == []


async def test_strict_and_required_tools_are_ordinary_tools(proxy: Proxy) -> None:
    async def run(row: Any, client: AgentClient) -> None:
        await ask(client, [user("Hi.")], tools=[ADD], tool_choice="required")
        await ask(client, [user("Hi.")], tools=[ADD], tool_choice="none")

    policy = Policy("One.")
    one = agents(run, proxy)
    seen: list[Any] = []
    real = one.renderer.text

    def text(messages: Any, tools: Any) -> str:
        seen.append(list(tools))
        return real(messages, tools)

    one.renderer.text = text
    assert (await one.play(Row(), policy)).reason is None
    assert [] in seen
    assert all("strict" not in tool["function"] for tools in seen for tool in tools)


async def test_a_stop_string_ends_the_turn_and_is_not_part_of_its_text(proxy: Proxy) -> None:
    async def run(row: Any, client: AgentClient) -> None:
        answer = await ask(client, [user("Hi.")], stop=["Observation:", "never"])
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Thought: a. ", "stop")
        asked = [user("Hi."), answer.choices[0].message, user("Observation: b")]
        await ask(client, asked, stop="Observation:")

    policy = Policy("Thought: a. Observation: I make it up.", "Done.")
    trajectory = await agents(run, proxy).play(Row(), policy)
    assert trajectory.reason is None
    (sequence,) = trajectory.sequences
    texts = [renderer(NAME).decoded(sequence.token_ids[span.start : span.end]) for span in sequence.sampled]
    assert texts[0].startswith("Thought: a. Observation:")
    assert "make it up" not in renderer(NAME).decoded(sequence.token_ids)
    assert texts[1] == "Done.<|im_end|>"


@pytest.mark.parametrize(
    ("limits", "status", "turns"),
    [
        ({"max_turns": 2}, "max_turns", 2),
        ({"max_tokens": 30}, "max_tokens", None),
        ({"max_model_len": 40}, "max_tokens", None),
    ],
)
async def test_a_limit_ends_the_episode_even_if_the_agent_goes_on(
    proxy: Proxy, limits: dict[str, int], status: str, turns: int | None
) -> None:
    async def run(row: Any, client: AgentClient) -> float:
        messages = [user("Hi.")]
        while True:
            answer = await ask(client, messages)
            messages += [answer.choices[0].message, user("Go on.")]

    policy = Policy("I think so, yes.")
    trajectory = await agents(run, proxy, **limits).play(Row(), policy)
    assert (trajectory.status, trajectory.reason, trajectory.reward) == (status, None, None)
    assert turns is None or trajectory.turns == turns
    assert_trains_what_the_policy_said(trajectory, policy)


async def test_the_clients_own_limit_cuts_its_answer_only(proxy: Proxy) -> None:
    async def run(row: Any, client: AgentClient) -> None:
        answer = await ask(client, [user("Hi.")], max_tokens=3)
        assert answer.choices[0].finish_reason == "length"
        await ask(client, [user("Hi."), answer.choices[0].message, user("Go on.")], max_completion_tokens=50)

    policy = Policy("I think so, yes.")
    trajectory = await agents(run, proxy).play(Row(), policy)
    assert (trajectory.status, len(trajectory.sequences)) == ("finished", 1)
    assert trajectory.sequences[0].sampled[0].size == 3


@pytest.mark.parametrize("reward", [np.array(0.5), np.float32(0.5), Fraction(1, 2)], ids=lambda one: type(one).__name__)
async def test_a_reward_may_be_a_number_of_any_library(proxy: Proxy, reward: Any) -> None:
    async def run(row: Any, client: AgentClient) -> Any:
        return reward

    trajectory = await agents(run, proxy).play(Row(), Policy("One."))
    assert (trajectory.reason, trajectory.reward) == (None, 0.5)


async def breaks(row: Any, client: AgentClient) -> float:
    await ask(client, [user("Hi.")])
    raise RuntimeError("no idea")


async def exits(row: Any, client: AgentClient) -> float:
    raise SystemExit(2)


async def hangs(row: Any, client: AgentClient) -> float:
    await ask(client, [user("Hi.")])
    await asyncio.sleep(30)
    return 1.0


def hangs_in_a_thread(row: Any, client: AgentClient) -> float:
    time.sleep(1.5)
    return 1.0


async def returns_text(row: Any, client: AgentClient) -> Any:
    return "good"


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (breaks, "agent agent: RuntimeError: no idea"),
        (exits, "agent agent: RuntimeError: SystemExit: 2"),
        (hangs, "agent agent: TimeoutError: no answer within 1 s"),
        (hangs_in_a_thread, "agent agent: Hung: no answer within 1 s"),
        (returns_text, "agent agent: ValueError: agent returned 'good', expected a finite number"),
    ],
)
async def test_an_agent_that_breaks_fails_its_episode_with_the_reason(proxy: Proxy, run: Any, reason: str) -> None:
    trajectory = await agents(run, proxy, timeout_s=1.0).play(Row(), Policy("One."))
    assert (trajectory.status, trajectory.in_loss) == ("failed", False)
    assert str(trajectory.reason).startswith(reason)


async def test_a_failed_agent_is_tried_once_more_and_the_group_scored_together(proxy: Proxy) -> None:
    tries: list[int] = []

    async def run(row: Any, client: AgentClient) -> float:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("flaky")
        return 1.0

    group = await agents(run, proxy).play_group(Row(), 3, [Policy("One.")] * 2)
    assert (group.row, [t.status for t in group.trajectories], len(tries)) == (3, ["finished"] * 2, 3)


async def test_another_attempt_of_an_agent_samples_other_turns(proxy: Proxy) -> None:
    asked: list[int] = []

    async def sample(prompt_ids: tuple[int, ...], *, max_tokens: int, turn: int) -> Completion:
        asked.append(turn)
        return completion((5,))

    async def run(row: Any, client: AgentClient) -> None:
        for text in ("Hi.", "Go on."):
            await ask(client, [user(text)])
        if len(asked) == 2:
            raise RuntimeError("what it said broke me")

    await agents(run, proxy).play_group(Row(), 0, [sample])
    assert asked == [0, 1, 2, 3]


async def test_the_prompt_is_that_of_the_longest_conversation_whoever_was_asked_first(proxy: Proxy) -> None:
    async def run(row: dict[str, Any], client: AgentClient) -> None:
        await ask(client, [{"role": "system", "content": "Plan."}, user("Be short."), user(row["prompt"])])
        messages = [user(row["prompt"])]
        for number in range(3):
            answer = await ask(client, messages, tools=[ADD] if number == 1 else [])
            messages += [answer.choices[0].message, user("Go  on.")]

    trajectory = await agents(run, proxy).play(Row("What?"), Policy("I think so, yes."))
    assert trajectory.reason is None
    assert [m["content"] for m in trajectory.prompt] == ["What?"]
    assert [m["role"] for m in trajectory.messages[1:]] == ["assistant", "user"] * 2 + ["assistant"]
