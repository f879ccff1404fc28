"""Load functions of the user's project, check their answers, and describe their errors.

This module must be fast to import, because every sandbox process imports it.
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
from types import ModuleType
from typing import Any, TypeVar

from .errors import ImportFailed, UserError

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

CLASSES = ("environment", "algorithm")
"""Kinds that are classes, or functions that make an object."""


def sandboxed(function: FunctionT) -> FunctionT:
    """Decorate a reward function so that it runs in a sandbox by default, if `sandbox` is not configured."""
    function.sandboxed = True  # type: ignore[attr-defined]  # a mark for `is_sandboxed`
    return function


class CallFailed(Exception):
    """A call failed or returned an invalid answer. The message is complete; the traceback adds nothing."""


def load_function(kind: str, name: str, arguments: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Import the function that `module:function` names, and bind `arguments` to it. See `load_callable`.

    Raises:
        UserError: it cannot be imported, or it is not a function.
    """
    function = load_callable(kind, name)
    if inspect.isclass(function):
        module_name, _, class_name = name.partition(":")
        raise UserError(
            f"{kind} {name} is a class, expected a function or an object with __call__. "
            f"Fix: add an object to {module_name}, such as score = {class_name}(), and use its name."
        )
    return _Configured(function, **arguments) if arguments else function


def load_callable(kind: str, name: str) -> Callable[..., Any]:
    """Import the function or class that `module:name` names. The module is in the project's folder, or in a package.

    Args:
        kind: the word for it in messages, such as "reward".

    Raises:
        UserError: it cannot be imported, or it cannot be called.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        fix = "correct the error in that module."
        if _is_missing(module_name, error):
            fix = "name a module in the project's folder, where config.yaml is, or an installed module."
        raise ImportFailed(
            f"{kind} {name}: importing {module_name} failed: {describe_error(error)}. Fix: {fix}"
        ) from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        what = "class" if kind in CLASSES else "function"
        raise UserError(
            f"{kind} {name}: module {module_name} has no {what} {function_name!r}, expected one of: "
            f"{', '.join(_defined(module, kind)) or '(it defines none)'}. Fix: correct the name in config.yaml."
        )
    return function


def _is_missing(module_name: str, error: BaseException) -> bool:
    """Whether the module itself, or a package that contains it, does not exist."""
    return isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")


def _defined(module: ModuleType, kind: str) -> list[str]:
    """Return the names of the public functions that `module` defines. A package has those of its modules, too.

    For the kinds in `CLASSES`: of its classes.
    """
    is_kind = inspect.isclass if kind in CLASSES else inspect.isfunction
    public = [member for member in inspect.getmembers(module, is_kind) if member[0][0] != "_"]
    return [name for name, function in public if f"{function.__module__}.".startswith(f"{module.__name__}.")]


class _Configured(functools.partial[Any]):
    """A function with its configured arguments. Each call gets its own copy of them."""

    def __call__(self, /, *args: Any, **given: Any) -> Any:
        return self.func(*args, **given, **copy.deepcopy(self.keywords))


def is_asynchronous(function: Callable[..., Any]) -> bool:
    """Whether it is an `async def` function, or an object with an `async def __call__`."""
    inner: Any = _unwrapped(function)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__)


def is_sandboxed(function: Callable[..., Any]) -> bool:
    """Whether it is decorated with `sandboxed`."""
    return bool(getattr(_unwrapped(function), "sandboxed", False))


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def plain(value: Any) -> Any:
    """Convert arrays and scalars of NumPy and torch to lists and numbers. Return any other value unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_rewards(answer: Any, size: int) -> tuple[float | None, ...]:
    """Return the answer of a reward function as floats.

    Raises:
        CallFailed: the answer is not a list of `size` items, each a finite number or None.
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
    except (OverflowError, ValueError):  # an integer too large for a float, or a signaling NaN
        number = math.nan
    if not math.isfinite(number):
        raise CallFailed(f"got {reward!r} for completion {index}, expected a finite number, or None for no reward")
    return number


def describe_error(error: BaseException) -> str:
    """Return the error as text, with the line that raised it unless it is an error of Tandem."""
    if isinstance(error, CallFailed | UserError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
