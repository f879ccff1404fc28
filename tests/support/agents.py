"""Run agents against the recording endpoint."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from support.episodes import Policy, bpe_tokenizer, renderer
from tandem_rollout.agents import AgentClient, Agents, plain_messages
from tandem_rollout.episode import Limits
from tandem_rollout.proxy import Proxy
from tandem_rollout.trajectory import Trajectory
from tandem_rollout.turns import TurnReader

NAME = "Qwen 3"


ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "strict": True,
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "a"}}},
    },
}


Play = Callable[..., Any]


@functools.cache
def reader(schemas: str) -> TurnReader:
    return TurnReader(bpe_tokenizer(), renderer(NAME), schemas=json.loads(schemas))


def agents(run: Any, proxy: Proxy, *, history: Any = "keep", timeout_s: float = 20.0, **limits: Any) -> Agents:
    return Agents(
        run=run,
        name="agent",
        proxy=proxy,
        renderer=renderer(NAME),
        reader_for=lambda schemas: reader(json.dumps(list(schemas))),
        normalize=plain_messages,
        limits=Limits(**({"max_tokens": 2000, "max_turns": 20} | limits)),
        timeout_s=timeout_s,
        history=history,
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def ask(client: AgentClient, messages: Sequence[Any], **options: Any) -> Any:
    async with client.openai() as connected:
        return await connected.chat.completions.create(model="any", messages=messages, **options)


class LosesAnswers(httpx.AsyncBaseTransport):
    """A network that loses the first answers, after the server has sent them."""

    def __init__(self, count: int) -> None:
        self._inner = httpx.AsyncHTTPTransport()
        self._left = count

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        if self._left:
            self._left -= 1
            await response.aread()
            raise httpx.ReadError("connection reset")
        return response


def assert_trains_what_the_policy_said(trajectory: Trajectory, policy: Policy) -> None:
    """Each sampled turn is in exactly one sequence, behind exactly the tokens that the policy saw."""
    trained = []
    for sequence in trajectory.sequences:
        for span in sequence.sampled:
            trained.append((sequence.token_ids[: span.start], sequence.token_ids[span.start : span.end]))
    assert sorted(trained) == sorted((prompt, c.token_ids) for prompt, c in policy.calls)
