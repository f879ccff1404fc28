"""The environment of a run without tools: one prompt, one turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..rendering import Schema
from ..turns import Turn
from .base import Environment, Row, Start, Step, opening


class SingleTurn:
    """Ends after the first turn. The prompt's tokens are those of the data set."""

    instance: Any = None

    async def reset(self, row: Row) -> Start:
        return Start(opening(row), token_ids=tuple(row.token_ids))

    async def step(self, turn: Turn) -> Step:
        del turn
        return Step([], done=True)

    async def rewards(self) -> dict[str, float | None]:
        return {}

    async def close(self, *, failed: bool) -> None:
        pass


class SingleTurns:
    """Makes `SingleTurn` environments."""

    schemas: Sequence[Schema] = ()
    answers_in_text = False

    def make(self) -> Environment:
        return SingleTurn()
