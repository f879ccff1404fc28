"""Play episodes with a scripted policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from support.episodes import Policy, bpe_tokenizer, renderer
from tandem_rollout.environments import (
    Environment,
    Environments,
    Start,
    Step,
    ToolLoops,
)
from tandem_rollout.episode import Limits, Player
from tandem_rollout.tools import Tool, Tools
from tandem_rollout.trajectory import Trajectory
from tandem_rollout.turns import Turn, TurnReader


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


def loops(*functions: Callable[..., Any], timeout_s: float = 5.0) -> ToolLoops:
    return ToolLoops(Tools([Tool.of(f) for f in functions or (add,)], timeout_s=timeout_s, max_characters=200))


def player(environments: Environments, *, name: str = "Qwen 3", history: Any = "keep", **limits: Any) -> Player:
    given = {"max_tokens": 2000, "max_turns": 5} | limits
    one = renderer(name)
    reader = TurnReader(bpe_tokenizer(), one, schemas=environments.schemas)
    return Player(one, reader, Limits(**given), history)


def assert_is_what_the_policy_saw(trajectory: Trajectory, policy: Policy) -> None:
    """The episode is one sequence: each prompt continues the one before, and only sampled tokens are trained."""
    if not policy.calls:
        assert trajectory.sequences == ()
        return
    (sequence,) = trajectory.sequences
    for prompt, sampled in policy.calls:
        assert sequence.token_ids[: len(prompt) + len(sampled.token_ids)] == prompt + sampled.token_ids
    assert [(s.start, s.size) for s in sequence.sampled] == [(len(p), len(c.token_ids)) for p, c in policy.calls]
    last_prompt, last = policy.calls[-1]
    assert len(sequence.token_ids) == len(last_prompt) + len(last.token_ids)
    assert trajectory.turns == len(policy.calls)


class Scripted:
    """An environment that a test fills in."""

    def __init__(self, messages: Sequence[dict[str, Any]] = ({"role": "user", "content": "Hi."},)) -> None:
        self.instance: Any = self
        self.closed: list[bool] = []
        self._messages = list(messages)

    async def reset(self, row: Any) -> Start:
        return Start(self._messages)

    async def step(self, turn: Turn) -> Step:
        return Step([], done=True)

    async def rewards(self) -> dict[str, float | None]:
        return {"own": 1.0, "other": None}

    async def close(self, *, failed: bool) -> None:
        self.closed.append(failed)


class Made:
    """Makes environments, and keeps them."""

    schemas: Sequence[Any] = ()
    answers_in_text = True

    def __init__(self, make: Callable[[], Any]) -> None:
        self.environments: list[Any] = []
        self._make = make

    def make(self) -> Environment:
        self.environments.append(self._make())
        environment: Environment = self.environments[-1]
        return environment
