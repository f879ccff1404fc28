"""One episode with an instance of a project's environment class."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..functions import plain
from ..rendering import Conversation
from ..text import cut, without_surrogates
from ..turns import Turn
from .base import Done, EnvironmentFailed, Row, Start, Step, answer_calls, opening
from .instances import Instance


class Pool(Protocol):
    """Where instances come from."""

    timeout_s: float
    max_characters: int

    def columns(self, row: Row) -> dict[str, Any]:
        """Return the arguments of `reset`."""

    async def take(self, row: Row) -> Instance:
        """Return an instance for a row."""

    async def give_back(self, row: Row, instance: Instance, *, failed: bool) -> None:
        """Take an instance back."""


class ClassEnvironment:
    """One episode with an instance of a project's class."""

    def __init__(self, pool: Pool) -> None:
        self.instance: Any = None
        self._pool = pool
        self._row: Row | None = None
        self._taken: Instance | None = None
        self._done = Done()

    async def reset(self, row: Row) -> Start:
        """Begin an episode. The instance gets copies of the columns, because it may change them."""
        self._row = row
        self._taken = taken = await self._pool.take(row)
        self.instance = taken.thing
        columns = copy.deepcopy(taken.accepted(self._pool.columns(row)))
        observation = await self._call(taken.thing.reset, **columns)
        return Start(self._observed(opening(row), observation), taken.tools.schemas)

    async def step(self, turn: Turn) -> Step:
        """Carry out the tool calls of a turn. If it has none, the class answers it, or the episode is over."""
        taken = self._entered()
        if turn.calls or turn.problem:
            step = await answer_calls(turn, taken.tools, taken.worker)
            if not taken.worker.is_usable:
                names = ", ".join(call.name for call in turn.calls)
                raise EnvironmentFailed(
                    f"environment {taken.kind.name}: {names}: no answer within {self._pool.timeout_s:g} s, and "
                    "a thread cannot be stopped, so the state of the environment is unknown"
                )
            return step
        if not taken.kind.answers_in_text:
            return Step([], done=True)
        return self._answered(await self._call(taken.thing.step, dict(turn.message)))

    async def rewards(self) -> dict[str, float | None]:
        """Return the class's own reward, under the name of the class."""
        taken = self._entered()
        if get_reward := getattr(taken.thing, "get_reward", None):
            return {taken.kind.name: self._number("get_reward", await self._call(get_reward))}
        reward = self._number("step", self._done.reward)
        return {} if reward is None else {taken.kind.name: reward}

    async def close(self, *, failed: bool) -> None:
        """See `Environment`."""
        taken, self._taken, self.instance = self._taken, None, None
        if taken is not None and self._row is not None:
            await self._pool.give_back(self._row, taken, failed=failed)

    def _entered(self) -> Instance:
        assert self._taken is not None, "reset comes first"
        return self._taken

    async def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await self._entered().call(method, self._pool.timeout_s, *args, **kwargs)

    def _observed(self, messages: Conversation, observation: Any) -> Conversation:
        """Add what `reset` returned to the last message of the user. If another one is last, it is a new message."""
        if observation is None:
            return messages
        text = self._text("reset", observation)
        *before, last = messages
        if last["role"] != "user":
            return [*messages, {"role": "user", "content": text}]
        return [*before, {**last, "content": last["content"] + text}]

    def _answered(self, answer: Any) -> Step:
        if isinstance(answer, Done):
            self._done = answer
            return Step([], done=True)
        if isinstance(answer, str):
            return Step([{"role": "user", "content": self._text("step", answer)}])
        messages = [answer] if isinstance(answer, Mapping) else answer
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise self._wrong("step", answer, "text, messages with role and content, or Done")
        return Step([{**message, "content": self._text("step", message["content"])} for message in messages])

    def _text(self, method: str, value: Any) -> str:
        """Return text, or the text of a list of parts."""
        parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise self._wrong(method, value, "text")
        return without_surrogates(cut("".join(map(str, texts)), self._pool.max_characters))

    def _number(self, method: str, value: Any) -> float | None:
        if value is None:
            return None
        value = plain(value)
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise self._wrong(method, value, "a finite number, or None for no reward")
        return float(value)

    def _wrong(self, method: str, value: Any, expected: str) -> EnvironmentFailed:
        name = self._entered().kind.name
        return EnvironmentFailed(f"environment {name}: {method} returned {cut(repr(value), 200)}, expected {expected}")


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message
