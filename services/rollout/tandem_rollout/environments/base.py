"""What an environment is to an episode: it opens the conversation, answers turns, and may give rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..rendering import Conversation, Schema
from ..tools import Tools
from ..turns import Turn
from ..workers import Worker, Workers


class EnvironmentFailed(Exception):
    """The environment broke. The episode fails with this reason, and the run goes on."""


class EnvironmentLost(EnvironmentFailed):
    """The environment cannot be reached any more. The cause is not what the policy said."""


@dataclass(frozen=True)
class Done:
    """What the `step` method of an environment class returns to end the episode."""

    reward: float | None = None
    """Reward of the episode, for classes without `get_reward`."""


class Row(Protocol):
    """A row of the data set, such as `prompts.PromptRow`."""

    @property
    def prompt(self) -> Any:
        """Text or messages. Empty if the environment opens the conversation."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The tokens of the prompt. Only single turns use them: other environments add tools or text."""

    @property
    def columns(self) -> Mapping[str, Any]:
        """All other columns."""


class Start(NamedTuple):
    """How an episode begins."""

    messages: Conversation
    """At least one."""
    tools: Sequence[Schema] = ()
    """The tools that the policy may call."""
    token_ids: tuple[int, ...] | None = None
    """The tokens of the messages. None: the chat template is applied."""


class Step(NamedTuple):
    """How the environment answers a turn."""

    messages: Conversation
    """What the policy reads next. Not used if the episode is over."""
    done: bool = False
    tool_calls: int = 0
    tool_errors: int = 0


class Environment(Protocol):
    """One episode's environment."""

    instance: Any
    """The project's own object, for reward functions that take `environments`. None if there is none."""

    async def reset(self, row: Row) -> Start:
        """Begin an episode.

        Raises:
            EnvironmentFailed: it cannot begin.
        """

    async def step(self, turn: Turn) -> Step:
        """Answer a turn of the policy.

        Raises:
            EnvironmentFailed: it cannot answer.
        """

    async def rewards(self) -> dict[str, float | None]:
        """Return the environment's own rewards, after the last turn: name → value.

        Raises:
            EnvironmentFailed: it cannot tell.
        """

    async def close(self, *, failed: bool) -> None:
        """End the episode. Called exactly once: after the group is scored if there is an `instance`, or else before.

        Args:
            failed: the environment must not be used for another episode.
        """


class Environments(Protocol):
    """Makes an environment for each episode."""

    schemas: Sequence[Schema]
    """All tools of all environments."""
    answers_in_text: bool
    """Whether an environment may answer with messages of the user."""

    def make(self) -> Environment:
        """Return an environment for one episode."""


def opening(row: Row) -> Conversation:
    """Return copies of the messages that the row's prompt consists of. Text is a message of the user."""
    prompt = row.prompt or ""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]


async def answer_calls(turn: Turn, tools: Tools, worker: Worker | Workers) -> Step:
    """Carry out the tool calls of a turn, one after another, and answer them.

    A call that could not be read is answered, too: with the last result, or in a message of the user if there is none,
    because some templates accept a tool's message only behind a call.
    """
    messages: Conversation = []
    errors = 0
    for sent, call in zip(turn.message.get("tool_calls", ()), turn.calls, strict=True):
        result = await tools.call(call, worker)
        errors += result.failed
        messages.append({"role": "tool", "tool_call_id": sent["id"], "name": call.name, "content": result.text})
    if turn.problem and messages:
        messages[-1]["content"] += "\n" + json.dumps({"error": turn.problem}, ensure_ascii=False)
    elif turn.problem:
        messages.append({"role": "user", "content": f"Your tool call cannot be read: {turn.problem}"})
    unread = bool(turn.problem)
    return Step(messages, tool_calls=len(turn.calls) + unread, tool_errors=errors + unread)
