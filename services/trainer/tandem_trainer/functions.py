"""A function of the user's project: finding it, and checking and describing what a call of it gives.

Imports nothing heavy: a sandbox's process starts with this module.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, TypeVar

from .errors import UserError

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def sandboxed(function: FunctionT) -> FunctionT:
    """Mark a reward function as one that runs in a sandbox where `sandbox` is not configured."""
    function.sandboxed = True  # type: ignore[attr-defined]
    return function


class CallFailed(Exception):
    """A call gave no answer, or one of no use. The message says all there is to say."""


def load_function(kind: str, name: str, arguments: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The function that `module:function` names, from the project's folder or anything installed, given `arguments`.

    Args:
        kind: what it is called in messages.

    Raises:
        UserError: it cannot be imported or is no function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{kind} {name}: importing {module_name} failed: {describe(error)}. Fix: name a module in the project's "
            "folder (that of config.yaml), or an installed one."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{kind} {name}: module {module_name} has no function {function_name!r}")
    if inspect.isclass(function):
        raise UserError(
            f"{kind} {name} is a class, expected a function or an object with __call__. "
            f"Fix: add an object to {module_name}, such as score = {function_name}(), and name that."
        )
    return _Configured(function, **arguments) if arguments else function


class _Configured(functools.partial[Any]):
    """A function with arguments of the configuration. Each call gets its own copies of them."""

    def __call__(self, /, *args: Any, **given: Any) -> Any:
        return self.func(*args, **given, **copy.deepcopy(self.keywords))


def is_asynchronous(function: Callable[..., Any]) -> bool:
    """Whether a call gives a coroutine at once: of an `async def`, or of an object with an `async def __call__`."""
    inner: Any = _unwrapped(function)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__)


def is_sandboxed(function: Callable[..., Any]) -> bool:
    """Whether it was marked with `sandboxed`."""
    return bool(getattr(_unwrapped(function), "sandboxed", False))


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def plain(value: Any) -> Any:
    """NumPy's and torch's arrays and scalars as Python's lists and numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_rewards(answer: Any, size: int) -> tuple[float | None, ...]:
    """The answer of a reward function as floats.

    Raises:
        CallFailed: it is not `size` finite numbers or Nones.
    """
    rewards = plain(answer)
    if not isinstance(rewards, list | tuple):
        raise CallFailed(f"got {type(rewards).__name__}, expected a list of {size} numbers, one per completion")
    if len(rewards) != size:
        raise CallFailed(f"got {len(rewards)} rewards, expected {size}, one per completion")
    return tuple(_finite(plain(reward), index) for index, reward in enumerate(rewards))


def _finite(reward: Any, index: int) -> float | None:
    if reward is None:
        return None
    try:
        number = float(reward) if isinstance(reward, numbers.Real | Decimal) else math.nan
    except (OverflowError, ValueError):  # an integer beyond all floats, a signaling NaN
        number = math.nan
    if not math.isfinite(number):
        raise CallFailed(f"got {reward!r} for completion {index}, expected a finite number, or None for no reward")
    return number


def describe(error: BaseException) -> str:
    """The error with the line that raised it, unless it is one of ours."""
    if isinstance(error, CallFailed | UserError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
