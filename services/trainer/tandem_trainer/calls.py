"""Calls of functions of the user's project. Each has a deadline, and arguments that nothing else holds.

A function may sort, pop or overwrite what it gets: another function, a later call and the training data do not see it.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import pickle
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, Generic, TypeVar

import anyio.to_thread

from .errors import UserError
from .functions import CallFailed, describe, is_asynchronous
from .prompts import PromptRow

log = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")

NO_SIGNALS = "signal only works in main thread of the main interpreter"
"""What `signal.signal` says elsewhere."""

Caller = Callable[[dict[str, Any]], Awaitable[Any]]
"""Calls one function with these arguments, within its deadline."""


class Hung(CallFailed):
    """The function did not answer in time and cannot be ended."""


class ProjectFunction(Generic[AnswerT]):
    """A function of the user's project. An error of it names the function and the row."""

    def __init__(
        self,
        kind: str,
        name: str,
        function: Callable[..., Any],
        call: Caller,
        check: Callable[[Any, int], AnswerT],
        *,
        arguments: Mapping[str, Any] | None = None,
        drop_errors: bool,
    ) -> None:
        """
        Args:
            kind: what it is called in messages.
            function: what `call` calls, to look at its parameters.
            check: from its answer, and the number of expected values, to the values; raises `CallFailed`.
            arguments: those of the configuration, which `call` adds.
        """
        self.name = name
        self._kind, self._function, self._call, self._check = kind, function, call, check
        self._arguments, self._drop_errors = arguments or {}, drop_errors

    def check_parameters(self, rows: Iterable[PromptRow], given: Collection[str]) -> None:
        """See that it can be called with the columns of all rows, besides `given`.

        Raises:
            UserError: it cannot; names the row and the parameter.
        """
        by_columns: dict[frozenset[str], PromptRow] = {}
        for row in rows:
            by_columns.setdefault(frozenset(row.columns), row)
        for columns, row in by_columns.items():
            if twice := sorted(self._arguments.keys() & {*columns, *given}):
                raise UserError(
                    f"{self._kind} {self.name}: its configured argument {twice[0]!r} is also what it gets from "
                    f"{row.where}, whose columns are {sorted(columns)}. Fix: rename the column or the argument."
                )
            if not self._drop_errors:
                self._bind(row, {*columns, *given})

    def _bind(self, row: PromptRow, names: Collection[str]) -> None:
        try:
            signature = inspect.signature(self._function)
        except ValueError:  # of a function that is not written in Python
            return
        try:
            signature.bind(**dict.fromkeys(names))
        except TypeError as error:
            raise UserError(
                f"{self._kind} {self.name} cannot be called for {row.where}: {error}. It gets {sorted(names)}. "
                "Fix: add the column to the data, or add **columns to the function's parameters."
            ) from error

    async def __call__(self, row: PromptRow, size: int, **arguments: Any) -> AnswerT | None:
        """Its answer to `size` times prompt and columns of the row, and `arguments`; None for a dropped error."""
        columns = {column: _copies(value, size) for column, value in row.columns.items()}
        try:
            answer = await self._call({"prompts": _copies(row.prompt, size), **arguments, **columns})
            return self._check(answer, size)
        except (Exception, SystemExit) as error:
            message = f"{self._kind} {self.name} on {row.where}: {describe(error)}"
            if self._drop_errors and not isinstance(error, Hung | UserError):
                log.warning("%s; the group is left out of the update (trainer.reward_errors: drop)", message)
                return None
            fix = "" if "Fix: " in message else " Fix: correct the function, or set trainer.reward_errors: drop."
            raise UserError(f"{message}.{fix}") from error


def _copies(value: Any, count: int) -> list[Any]:
    """Equal values that share nothing which can be changed."""
    if isinstance(value, str | int | float | bool | None):
        return [value] * count
    pickled = pickle.dumps(value)  # a tenth of the time that deepcopy takes
    return [pickle.loads(pickled) for _ in range(count)]  # noqa: S301 - what was pickled above


def in_process(function: Callable[..., Any], timeout_s: float, turn: asyncio.Lock) -> Caller:
    """A caller that runs asynchronous functions concurrently, and synchronous ones in a worker thread.

    Of the latter, one runs at a time of all that share `turn`, so that they need not be thread-safe and do not hold up
    the streams. One that returns an awaitable, such as a decorated coroutine function, is awaited after its turn.
    """
    if is_asynchronous(function):
        return functools.partial(_await, function, timeout_s)
    return functools.partial(_run_in_thread, function, timeout_s, turn)


async def _await(function: Callable[..., Awaitable[Any]], timeout_s: float, arguments: dict[str, Any]) -> Any:
    return await _awaited(function(**arguments), asyncio.get_running_loop().time() + timeout_s, timeout_s)


async def _awaited(answer: Awaitable[Any], deadline_s: float, timeout_s: float) -> Any:
    try:
        async with asyncio.timeout_at(deadline_s) as deadline:
            return await answer
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise CallFailed(_late(timeout_s)) from error


async def _run_in_thread(
    function: Callable[..., Any], timeout_s: float, turn: asyncio.Lock, arguments: dict[str, Any]
) -> Any:
    """The deadline leaves out the wait for its turn."""
    async with turn:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline_s) as deadline:
                answer = await anyio.to_thread.run_sync(lambda: function(**arguments), abandon_on_cancel=True)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise Hung(
                f"{_late(timeout_s)}, and a thread cannot be ended. Fix: give the reward more time, or set "
                "`sandbox: true`: a process that is killed at its deadline"
            ) from error
        except ValueError as error:
            if NO_SIGNALS not in map(str, (error, error.__cause__, error.__context__)):
                raise
            raise CallFailed(
                f"{describe(error)}. Its time limit uses a signal, which works in a main thread only, and this call "
                "ran in another. Fix: set `sandbox: true`, or use a time limit without signals"
            ) from error
    return await _awaited(answer, deadline_s, timeout_s) if inspect.isawaitable(answer) else answer


def _late(timeout_s: float) -> str:
    return f"no answer within {timeout_s:g} s (trainer.reward_timeout_s, or the reward's own timeout_s)"
