"""Call functions of the user's project, with a deadline and with copies of the arguments.

A function may sort, pop or overwrite its arguments. This does not affect other functions, later calls or the data.
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

from tandem_protocol.repeats import Repeats

from .errors import UserError
from .functions import CallFailed, describe_error, is_asynchronous
from .prompts import PromptRow

repeats = Repeats(logging.getLogger(__name__))

AnswerT = TypeVar("AnswerT")

NO_SIGNALS = "signal only works in main thread of the main interpreter"
"""The error of `signal.signal` in any other thread."""

Caller = Callable[[dict[str, Any]], Awaitable[Any]]
"""Calls one function with the given keyword arguments, and enforces its deadline."""


class Hung(CallFailed):
    """The function missed its deadline, and its thread cannot be stopped."""


class ProjectFunction(Generic[AnswerT]):
    """A function of the user's project. Its errors name the function and the row of the data set."""

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
            kind: the word for it in messages, such as "reward".
            function: the function that `call` calls. Only its signature is used here.
            check: converts the answer to the result. It also gets the number of expected values. Raises `CallFailed`.
            arguments: the configured arguments. `call` adds them; here they are only compared with the columns.
        """
        self.name = name
        self._kind = kind
        self._function = function
        self._call = call
        self._check = check
        self._arguments = arguments or {}
        self._drop_errors = drop_errors

    def check_parameters(self, rows: Iterable[PromptRow], given: Collection[str]) -> None:
        """Check that the function accepts the columns of all rows, together with the arguments named in `given`.

        Raises:
            UserError: it does not; names the row and the parameter.
        """
        by_columns: dict[frozenset[str], PromptRow] = {}
        for row in rows:
            by_columns.setdefault(frozenset(row.columns), row)
        for columns, row in by_columns.items():
            if duplicates := sorted(self._arguments.keys() & {*columns, *given}):
                raise UserError(
                    f"{self._kind} {self.name}: its configured argument {duplicates[0]!r} has the name of an argument "
                    f"from {row.where}, whose columns are {sorted(columns)}. Fix: rename the column or the argument."
                )
            if not self._drop_errors:
                self._bind(row, {*columns, *given})

    def accepts(self, name: str) -> bool:
        """Whether the function has a parameter of this name, or takes any."""
        try:
            parameters = inspect.signature(self._function).parameters
        except ValueError:  # the function is not written in Python, so its signature is unknown
            return False
        return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())

    def requires(self, name: str) -> bool:
        """Whether the function has a parameter of this name without a default."""
        try:
            parameter = inspect.signature(self._function).parameters.get(name)
        except ValueError:  # the function is not written in Python, so its signature is unknown
            return False
        return parameter is not None and parameter.default is parameter.empty

    def _bind(self, row: PromptRow, names: Collection[str]) -> None:
        try:
            signature = inspect.signature(self._function)
        except ValueError:  # the function is not written in Python, so its signature is unknown
            return
        try:
            signature.bind(**dict.fromkeys(names))
        except TypeError as error:
            raise UserError(
                f"{self._kind} {self.name} cannot be called for {row.where}: {error}. It gets {sorted(names)}. "
                "Fix: add the column to the data, or add **columns to the function's parameters."
            ) from error

    async def __call__(self, row: PromptRow, size: int, **arguments: Any) -> AnswerT | None:
        """Call the function with `size` copies of the prompt and the columns of the row, and with `arguments`.

        Returns:
            The checked answer. None if the call failed and `drop_errors` is set.

        Raises:
            UserError: the call failed, and errors are not dropped or the function cannot be stopped.
        """
        columns = {column: _copies(value, size) for column, value in row.columns.items()}
        try:
            answer = await self._call({"prompts": _copies(row.prompt, size), **arguments, **columns})
            return self._check(answer, size)
        except (Exception, SystemExit) as error:
            message = f"{self._kind} {self.name} on {row.where}: {describe_error(error)}"
            if self._drop_errors and not isinstance(error, Hung | UserError):
                dropped = f"{message}; the group is left out of the update (trainer.reward_errors: drop)"
                kind = f"{self.name} {type(error).__name__}"
                repeats.say(logging.WARNING, kind, dropped, event="reward_failed", function=self.name)
                return None
            fix = "" if "Fix: " in message else " Fix: correct the function, or set trainer.reward_errors: drop."
            raise UserError(f"{message}.{fix}") from error


def _copies(value: Any, count: int) -> list[Any]:
    """Return `count` copies that share no mutable object."""
    if isinstance(value, str | int | float | bool | None):
        return [value] * count
    pickled = pickle.dumps(value)  # about ten times as fast as deepcopy
    return [pickle.loads(pickled) for _ in range(count)]  # noqa: S301 - pickled in the line above


def in_process(function: Callable[..., Any], timeout_s: float, turn: asyncio.Lock) -> Caller:
    """Return a caller that runs an asynchronous function in the event loop, and a synchronous one in a worker thread.

    Synchronous functions that share `turn` run one at a time, so they need not be thread-safe. The worker thread keeps
    them from blocking the rollout streams. If a synchronous function returns an awaitable, as a decorated coroutine
    function may, the awaitable is awaited after the lock is released.
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
    except asyncio.CancelledError as error:
        if (task := asyncio.current_task()) is None or task.cancelling():
            raise
        raise CallFailed("the function cancelled itself") from error  # otherwise nobody would hear of it


async def _run_in_thread(
    function: Callable[..., Any], timeout_s: float, turn: asyncio.Lock, arguments: dict[str, Any]
) -> Any:
    """Run `function` in a worker thread. The deadline starts when the lock is acquired."""
    async with turn:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline_s) as deadline:
                answer = await anyio.to_thread.run_sync(lambda: function(**arguments), abandon_on_cancel=True)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise Hung(
                f"{_late(timeout_s)}, and a thread cannot be stopped. Fix: give the reward more time, or set "
                "`sandbox: true`, which runs it in a process that is killed at the deadline"
            ) from error
        except ValueError as error:
            if NO_SIGNALS not in map(str, (error, error.__cause__, error.__context__)):
                raise
            raise CallFailed(
                f"{describe_error(error)}. Its time limit uses a signal. Signals work in the main thread only, and "
                "this call ran in a worker thread. Fix: set `sandbox: true`, or use a time limit without signals"
            ) from error
    return await _awaited(answer, deadline_s, timeout_s) if inspect.isawaitable(answer) else answer


def _late(timeout_s: float) -> str:
    return f"no answer within {timeout_s:g} s (trainer.reward_timeout_s, or the reward's own timeout_s)"
