"""Agents written with `openai-agents` and `smolagents`: each turn is recorded once, behind what the policy saw."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from support.agent_libraries import AGENTS
from support.agents import NAME, LosesAnswers, agents, assert_trains_what_the_policy_said
from support.episodes import Policy, Row, called, renderer
from tandem_rollout.agents import AgentClient
from tandem_rollout.proxy import Proxy
from tandem_rollout.trajectory import Trajectory

pytestmark = pytest.mark.agents
TIMEOUT_S = 120.0
QUESTION = "What is 1+2?"
ADDED: list[tuple[int, int]] = []
"""What `add` was called with."""
LOSSES = [pytest.param(0, id="no answer lost"), pytest.param(1, id="an answer lost")]


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(AGENTS))
    ADDED.clear()
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    one = Proxy("policy")
    async with one.serve():
        yield one


async def play(run: Any, proxy: Proxy, policy: Policy) -> Trajectory:
    one = await agents(run, proxy, timeout_s=TIMEOUT_S).play(Row(QUESTION), policy)
    assert one.reason is None
    assert one.turns == len(policy.calls)
    assert_trains_what_the_policy_said(one, policy)
    return one


def add(a: int, b: int = 2) -> int:
    """Add two numbers.

    Args:
        a: the first number
        b: the second number
    """
    ADDED.append((a, b))
    return a + b


@pytest.mark.parametrize("lost", LOSSES)
async def test_openai_agents_calls_a_tool(proxy: Proxy, lost: int) -> None:
    from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool

    async def run(row: dict[str, Any], client: AgentClient) -> float:
        http = httpx.AsyncClient(transport=LosesAnswers(lost))
        async with client.openai(http_client=http, max_retries=3) as connected:
            model = OpenAIChatCompletionsModel(client.model, connected)
            agent = Agent(name="adder", instructions="Use the tool.", model=model, tools=[function_tool(add)])
            result = await Runner.run(agent, row["prompt"])
        return float("3" in result.final_output)

    one = await play(run, proxy, Policy("Let me see. " + called("add", a=1), "It is 3."))
    assert (one.turns, one.tool_calls, len(one.sequences), one.reward) == (2, 1, 1, 1.0)
    assert ADDED == [(1, 2)]


async def test_openai_agents_streams_two_sub_agents_in_parallel(proxy: Proxy) -> None:
    from agents import Agent, OpenAIChatCompletionsModel, Runner

    async def run(row: dict[str, Any], client: AgentClient) -> None:
        async with client.openai() as connected:
            model = OpenAIChatCompletionsModel(client.model, connected)

            async def ask(name: str) -> str:
                agent = Agent(name=name, instructions=f"You are {name}.", model=model)
                streamed = Runner.run_streamed(agent, row["prompt"])
                async for _ in streamed.stream_events():
                    pass
                return str(streamed.final_output)

            assert [*await asyncio.gather(ask("Ada"), ask("Bob"))] == ["I think so."] * 2

    one = await play(run, proxy, Policy("I think so."))
    assert (one.turns, len(one.sequences)) == (2, 2)


async def test_an_agent_of_openai_agents_is_the_tool_of_another(proxy: Proxy) -> None:
    from agents import Agent, OpenAIChatCompletionsModel, Runner

    async def run(row: dict[str, Any], client: AgentClient) -> float:
        async with client.openai() as connected:
            model = OpenAIChatCompletionsModel(client.model, connected)
            helper = Agent(name="helper", instructions="You add.", model=model)
            tool = helper.as_tool(tool_name="ask_helper", tool_description="Ask it.")
            result = await Runner.run(Agent(name="main", instructions="Ask.", model=model, tools=[tool]), row["prompt"])
        return float("3" in result.final_output)

    one = await play(run, proxy, Policy("Ask. " + called("ask_helper", input="1+2?"), "3, I say.", "It is 3."))
    assert (one.turns, len(one.sequences), one.reward) == (3, 2, 1.0)


@pytest.mark.parametrize("lost", LOSSES)
@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
async def test_smolagents_calls_a_tool(proxy: Proxy, is_streamed: bool, lost: int) -> None:
    from smolagents import OpenAIServerModel, ToolCallingAgent, tool

    def run(row: dict[str, Any], client: AgentClient) -> float:
        http = httpx.Client(transport=LosesAnswersInThread(lost))
        options = {"http_client": http, "max_retries": 3}
        model = OpenAIServerModel(client.model, client.base_url, api_key=client.api_key, client_kwargs=options)
        agent = ToolCallingAgent(
            tools=[tool(add)], model=model, max_steps=4, stream_outputs=is_streamed, verbosity_level=0
        )
        return float(str(agent.run(row["prompt"])) == "3")

    policy = Policy("Let me see. " + called("add", a=1, b=2), called("final_answer", answer="3"))
    one = await play(run, proxy, policy)
    assert (one.turns, one.reward) == (2, 1.0)
    assert ADDED == [(1, 2)]


async def test_smolagents_writes_code(proxy: Proxy) -> None:
    from smolagents import CodeAgent, OpenAIServerModel

    def run(row: dict[str, Any], client: AgentClient) -> float:
        model = OpenAIServerModel(client.model, client.base_url, api_key=client.api_key)
        agent = CodeAgent(tools=[], model=model, max_steps=4, verbosity_level=0)
        return float(str(agent.run(row["prompt"])) == "3")

    turns = ["Thought: add\n<code>\nx = 1+2\nprint(x)\n</code>", "Thought: done\n<code>\nfinal_answer(x)\n</code>"]
    policy = Policy(*(f"{turn} I go on." for turn in turns))
    one = await agents(run, proxy, timeout_s=TIMEOUT_S).play(Row(QUESTION), policy)
    assert (one.reason, one.turns, one.reward) == (None, 2, 1.0)
    sampled = [(sequence.token_ids, span) for sequence in one.sequences for span in sequence.sampled]
    assert [ids[: span.start] for ids, span in sampled] == [prompt for prompt, _ in policy.calls]
    assert [renderer(NAME).decoded(ids[span.start : span.end]) for ids, span in sampled] == turns, (
        "cut at the stop string"
    )


class LosesAnswersInThread(httpx.BaseTransport):
    """`LosesAnswers` for a client that is not asynchronous."""

    def __init__(self, count: int) -> None:
        self._inner = httpx.HTTPTransport()
        self._left = count

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._inner.handle_request(request)
        if self._left:
            self._left -= 1
            response.read()
            raise httpx.ReadError("connection reset")
        return response
