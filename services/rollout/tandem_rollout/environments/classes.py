"""Environment classes of the project, in the convention of TRL's `environment_factory`.

Example:

    class Counter:
        def reset(self, target: int, **columns) -> str | None:
            self.count, self.target = 0, target
            return f"Count to {target}."

        def increment(self, by: int) -> int:
            \"\"\"Increment the counter.

            Args:
                by: how much to add
            \"\"\"
            self.count += by
            return self.count

        def get_reward(self) -> float:
            return float(self.count == self.target)

- `reset` gets the columns of the row. Text that it returns is added to the last message of the user.
- All other public methods are tools.
- `get_reward` is optional.

What TRL does not have: `async def step(self, message)` answers a turn without tool calls. It returns text, messages, or
`Done`. A class may be a context manager: it is entered before its first episode, and left after its last one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..rendering import Schema
from ..tools import Tool, Tools
from ..workers import Worker
from .base import Environment, EnvironmentFailed, Row
from .class_episode import ClassEnvironment
from .instances import Instance, Kind, called

Factory = Callable[[], Any]
"""A class without required arguments, or a function that returns an instance."""
COLUMN = "environment"
"""The column that selects the environment if there are several."""


class ClassEnvironments:
    """Makes environments from the project's classes. Instances are used again: `reset` begins a new episode."""

    def __init__(
        self,
        factories: Factory | Mapping[str, Factory],
        *,
        tools: Sequence[Tool] = (),
        timeout_s: float,
        max_characters: int,
    ) -> None:
        """
        Args:
            factories: one factory, or name → factory: the column `environment` then selects one.
            tools: further tools, which all environments have.
            timeout_s: time limit of each call of a method.
            max_characters: longest text that the policy gets to read from a method. A longer one is cut.
        """
        self._selects = isinstance(factories, Mapping)
        self.schemas: Sequence[Schema] = [tool.schema for tool in tools]
        self.answers_in_text = False
        self.without_rewards: list[str] = []
        """The environments that give no rewards of their own. `start` finds them."""
        self.timeout_s = timeout_s
        self.max_characters = max_characters
        self._factories: dict[Any, Factory] = {**factories} if isinstance(factories, Mapping) else {None: factories}
        self._tools = list(tools)
        self._kinds: dict[type, Kind] = {}
        self._idle: dict[str | None, list[Instance]] = {name: [] for name in self._factories}

    async def start(self) -> None:
        """Create one instance of each environment, and read which tools they have.

        Raises:
            UserError: an environment cannot be created, or does not follow the convention.
        """
        schemas = {schema["function"]["name"]: schema for schema in self.schemas}
        for name in self._factories:
            try:
                instance = await self._create(name)
            except EnvironmentFailed as error:
                raise UserError(f"{error}. Fix: correct the environment.") from error
            self._idle[name].append(instance)
            schemas |= {schema["function"]["name"]: schema for schema in instance.tools.schemas}
            self.answers_in_text |= instance.kind.answers_in_text
            self.without_rewards += [] if instance.kind.gives_rewards else [instance.kind.name]
        self.schemas = list(schemas.values())

    def check_rows(self, rows: Iterable[Row]) -> None:
        """Check that each row selects an environment, and has the columns that its `reset` needs. `start` comes first.

        Raises:
            UserError: a row does not; says which.
        """
        for index, row in enumerate(rows):
            where = getattr(row, "where", f"row {index}")
            instance = self._idle[self._selected(row, where)][0]
            columns = self.columns(row)
            try:
                inspect.signature(instance.thing.reset).bind(**instance.accepted(columns))
            except TypeError as error:
                raise UserError(
                    f"environment {instance.kind.name}: reset cannot be called for {where}: {error}. The row has "
                    f"{sorted(columns)}. Fix: add the column, or give the parameter a default."
                ) from error

    def make(self) -> Environment:
        """See `Environments`."""
        return ClassEnvironment(self)

    def columns(self, row: Row) -> dict[str, Any]:
        """Return the arguments of `reset`: all columns, without the one that selects the environment."""
        columns = {**({"prompt": row.prompt} if row.prompt else {}), **row.columns}
        return {name: value for name, value in columns.items() if not (self._selects and name == COLUMN)}

    async def take(self, row: Row) -> Instance:
        """Return an idle instance, or a new one."""
        name = self._selected(row)
        return self._idle[name].pop() if self._idle[name] else await self._create(name)

    async def give_back(self, row: Row, instance: Instance, *, failed: bool) -> None:
        """Keep an instance for the next episode, unless it has failed."""
        if failed:
            await instance.discard(self.timeout_s)
        else:
            self._idle[self._selected(row)].append(instance)

    async def close(self) -> None:
        """Discard all idle instances."""
        for instances in self._idle.values():
            while instances:
                await instances.pop().discard(self.timeout_s)

    def _selected(self, row: Row, where: str = "the row") -> str | None:
        """Return the name of the row's environment; None if there is only one.

        Raises:
            UserError: there is none with that name.
        """
        name = row.columns.get(COLUMN) if self._selects else None
        if name not in self._factories:
            raise UserError(
                f"{where} has {COLUMN}: {name!r}, expected one of {', '.join(map(str, self._factories))}. "
                f"Fix: correct the column {COLUMN!r}."
            )
        return name

    async def _create(self, name: str | None) -> Instance:
        worker = Worker("environment")
        factory = self._factories[name]
        shown = getattr(factory, "__name__", str(factory))
        thing = await called(f"environment {shown}", factory, worker, self.timeout_s)
        kind = self._kinds.get(type(thing)) or Kind.of(type(thing))
        self._kinds[type(thing)] = kind
        tools = Tools([*self._tools, *kind.tools(thing)], timeout_s=self.timeout_s, max_characters=self.max_characters)
        instance = Instance(thing, kind, tools, worker)
        if enter := getattr(thing, "__aenter__", None) or getattr(thing, "__enter__", None):
            await instance.call(enter, self.timeout_s)
        return instance
