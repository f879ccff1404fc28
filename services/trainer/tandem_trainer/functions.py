"""A function of the user's project: finding it, and checking and describing what comes of a call.

Imports nothing heavy: a sandbox's process starts with this module.
"""

from __future__ import annotations

import functools
import importlib
import math
import numbers
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from .errors import UserError


class CallFailed(Exception):
    """A call gave no answer; the message says all there is to say."""


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
            f"{kind} {name}: importing {module_name} failed: {describe(error)}. Wanted a module in the "
            "project's folder (that of config.yaml) or an installed one."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{kind} {name}: module {module_name} has no function {function_name!r}")
    return functools.partial(function, **arguments) if arguments else function


def check_rewards(answer: Any, size: int) -> tuple[float | None, ...]:
    """The answer of a reward function as floats.

    Raises:
        ValueError: it is not `size` finite numbers or Nones.
    """
    if hasattr(answer, "tolist"):  # an array or a tensor
        answer = answer.tolist()
    if not isinstance(answer, list | tuple):
        raise ValueError(f"got {type(answer).__name__}; wanted a list of {size} floats, one a completion")
    if len(answer) != size:
        raise ValueError(f"got {len(answer)} rewards; wanted {size}, one a completion")
    for index, reward in enumerate(answer):
        if reward is not None and not (isinstance(reward, numbers.Real) and math.isfinite(reward)):
            raise ValueError(f"got {reward!r} for completion {index}; wanted a finite number, or None for no reward")
    return tuple(None if reward is None else float(reward) for reward in answer)


def describe(error: BaseException) -> str:
    """The error with the line that raised it, unless it is one of ours."""
    if isinstance(error, CallFailed | UserError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
