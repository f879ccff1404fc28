"""Instances of the project's environment classes: which methods are tools, and in which thread they run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..tools import Tool, Tools
from ..workers import Worker, call
from .base import EnvironmentFailed


@dataclass(frozen=True)
class Kind:
    """What a class offers."""

    name: str
    methods: Mapping[str, Tool]
    """Name → tool of a method. It takes the instance first, unless the method is static."""
    static: Collection[str]
    answers_in_text: bool
    gives_rewards: bool
    """Whether it can reward episodes: with `get_reward`, or with `Done` from `step`."""

    @classmethod
    def of(cls, type_: type) -> Kind:
        """
        Raises:
            UserError: it has no `reset`, or a public method has no types or descriptions.
        """
        functions = dict(inspect.getmembers(type_, inspect.isfunction))  # not properties: reading them may do things
        if "reset" not in functions:
            raise UserError(f"environment {type_.__name__} has no method reset, expected reset(self, **columns).")
        answers_in_text = _is_our_step(functions.get("step"))
        reserved = {"reset", "get_reward", *(["step"] if answers_in_text else [])}
        public = [name for name in functions if not name.startswith("_") and name not in reserved]
        return cls(
            name=type_.__name__,
            methods={name: Tool.of(functions[name], f"environment {type_.__name__}: tool") for name in public},
            static={name for name in public if isinstance(inspect.getattr_static(type_, name), staticmethod)},
            answers_in_text=answers_in_text,
            gives_rewards="get_reward" in functions or answers_in_text,
        )

    def tools(self, instance: Any) -> list[Tool]:
        """Return the tools of one instance."""
        return [t if name in self.static else t.of_instance(instance) for name, t in self.methods.items()]


def _is_our_step(step: Callable[..., Any] | None) -> bool:
    """Whether it is `async def step(self, message)`. Any other method of that name is a tool, as with TRL."""
    return inspect.iscoroutinefunction(step) and list(inspect.signature(step).parameters)[1:] == ["message"]


@dataclass
class Instance:
    """An object of a project's class, and the thread in which its methods run."""

    thing: Any
    kind: Kind
    tools: Tools
    worker: Worker

    @functools.cached_property
    def _reset_parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.thing.reset).parameters

    def accepted(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Return the columns that `reset` has parameters for."""
        parameters = self._reset_parameters
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return columns
        return {name: value for name, value in columns.items() if name in parameters}

    async def call(self, method: Callable[..., Any], timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        """Call a method. Raises `EnvironmentFailed`, as `called` does."""
        name = f"environment {self.kind.name}: {method.__name__}"
        return await called(name, functools.partial(method, *args, **kwargs), self.worker, timeout_s)

    async def discard(self, timeout_s: float) -> None:
        """Leave the context manager, if it is one. Errors do not matter any more."""
        leave = getattr(self.thing, "__aexit__", None) or getattr(self.thing, "__exit__", None)
        try:
            if leave and self.worker.is_usable:
                await self.call(leave, timeout_s, None, None, None)
        except EnvironmentFailed:
            pass
        finally:
            self.worker.close()


async def called(name: str, function: Callable[[], Any], worker: Worker, timeout_s: float) -> Any:
    """Call a function of the project, with a deadline.

    Raises:
        EnvironmentFailed: it raised, or it is late; says which.
    """
    try:
        return await call(function, worker, timeout_s)
    except TimeoutError as error:
        raise EnvironmentFailed(f"{name}: {str(error) or 'TimeoutError'}") from error
    except Exception as error:
        raise EnvironmentFailed(f"{name}: {type(error).__name__}: {error}") from error
