"""The environment of a run with tools: the policy calls them until it answers without a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..rendering import Schema
from ..tools import Tools
from ..turns import Turn
from ..workers import Workers
from .base import Environment, Row, Start, Step, answer_calls, opening


class ToolLoop:
    """One episode with tools that have no state."""

    instance: Any = None

    def __init__(self, tools: Tools, workers: Workers) -> None:
        self._tools = tools
        self._workers = workers

    async def reset(self, row: Row) -> Start:
        return Start(opening(row), self._tools.schemas)

    async def step(self, turn: Turn) -> Step:
        if not turn.calls and not turn.problem:
            return Step([], done=True)
        return await answer_calls(turn, self._tools, self._workers)

    async def rewards(self) -> dict[str, float | None]:
        return {}

    async def close(self, *, failed: bool) -> None:
        pass


class ToolLoops:
    """Makes `ToolLoop` environments, which share their tools and threads."""

    answers_in_text = False

    def __init__(self, tools: Tools) -> None:
        self.schemas: Sequence[Schema] = tools.schemas
        self._tools = tools
        self._workers = Workers("tool")

    def make(self) -> Environment:
        return ToolLoop(self._tools, self._workers)

    async def close(self) -> None:
        """End the idle threads."""
        self._workers.close()
