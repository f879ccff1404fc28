"""Environments on servers: `python -m tandem_rollout.server`, or any program that follows the contract in `wire.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import UserError
from ..rendering import Schema
from ..turns import Turn
from . import wire
from .base import Environment, EnvironmentFailed, Row, Start, Step
from .servers import Place, Servers


class RemoteEnvironments:
    """Makes environments on servers."""

    def __init__(self, servers: Servers, *, start_timeout_s: float) -> None:
        """
        Args:
            start_timeout_s: how long `start` waits for the servers.
        """
        self.schemas: Sequence[Schema] = ()
        self.answers_in_text = False
        self.without_rewards: list[str] = []
        """The environments that give no rewards of their own. `start` finds them."""
        self._servers = servers
        self._start_timeout_s = start_timeout_s

    async def start(self) -> None:
        """Wait until every replica answers, and read which tools there are.

        Raises:
            UserError: a replica cannot be reached in time, refuses the token, or serves something else than the others.
        """
        infos = await self._servers.infos(self._start_timeout_s)
        first_url, first = next(iter(infos.items()))
        for url, info in infos.items():
            if info.protocol != wire.PROTOCOL_VERSION:
                raise UserError(
                    f"environment server {url} speaks protocol {info.protocol}, expected {wire.PROTOCOL_VERSION}. "
                    "Fix: run the same release of Tandem on both sides."
                )
            if (info.schemas, info.answers_in_text) != (first.schemas, first.answers_in_text):
                raise UserError(
                    f"environment server {url} has the tools {_names(info)}, expected those of {first_url}, which are "
                    f"{_names(first)}. Fix: give all replicas the same project, and restart them."
                )
        self.schemas, self.answers_in_text = first.schemas, first.answers_in_text
        self.without_rewards = list(first.without_rewards)

    def check_rows(self, rows: Iterable[Row]) -> None:
        """Check that the rows can be sent.

        Raises:
            UserError: a column of a row is not JSON; says which.
        """
        for index, row in enumerate(rows):
            for column, value in row.columns.items():
                try:
                    wire.OpenSession(columns={column: value}).model_dump_json()
                except ValueError as error:
                    raise UserError(
                        f"{getattr(row, 'where', f'row {index}')}: column {column!r} of type {type(value).__name__} "
                        f"cannot be sent to an environment server: {error}. Fix: convert it to text, numbers, lists or "
                        "mappings, or remove trainer.rollout.environment_urls."
                    ) from error

    def make(self) -> Environment:
        """See `Environments`."""
        return RemoteEnvironment(self._servers)

    async def close(self) -> None:
        """Close the connections."""
        await self._servers.close()


class RemoteEnvironment:
    """One episode on a server."""

    instance: Any = None
    """The project's object is in another process."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._place: Place | None = None
        self._steps = 0

    async def reset(self, row: Row) -> Start:
        """Open a session on a server."""
        body = wire.OpenSession(prompt=row.prompt, columns=dict(row.columns))
        self._place, opened = await self._servers.open(body)
        return Start(list(opened.messages), opened.tools)

    async def step(self, turn: Turn) -> Step:
        """Send the turn."""
        place = self._entered()
        path = wire.STEP.replace("{number}", str(self._steps))
        body = wire.TakeStep(message=turn.message, problem=turn.problem)
        taken = await self._servers.request(place, "PUT", path, wire.StepTaken, calls=len(turn.calls), body=body)
        self._steps += 1
        if not taken.messages and not taken.done:
            raise EnvironmentFailed(f"{place.replica}: got a step without messages, expected some, or done")
        return Step(list(taken.messages), taken.done, taken.tool_calls, taken.tool_errors)

    async def rewards(self) -> dict[str, float | None]:
        """Ask for the environment's own rewards."""
        answer = await self._servers.request(self._entered(), "GET", wire.REWARDS, wire.SessionRewards)
        return dict(answer.rewards)

    async def close(self, *, failed: bool) -> None:
        """Close the session."""
        place, self._place = self._place, None
        if place is not None:
            await self._servers.release(place, failed=failed)

    def _entered(self) -> Place:
        assert self._place is not None, "reset comes first"
        return self._place


def _names(info: wire.EnvironmentInfo) -> list[str]:
    return sorted(str(schema.get("function", {}).get("name")) for schema in info.schemas)
