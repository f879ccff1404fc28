"""Call functions of the user's project. A function takes by name what it needs, as a reward function does."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tandem_rollout.errors import UserError
from tandem_rollout.functions import describe_error, is_asynchronous, load_function


class NamedFunction:
    """A function of the project, with its configured arguments."""

    def __init__(self, kind: str, name: str, arguments: Mapping[str, Any], offered: Collection[str]) -> None:
        """
        Args:
            kind: the word for it in messages, such as "loss".
            offered: names of everything that a call offers.

        Raises:
            UserError: the function cannot be imported, or not be called with this.
        """
        self.title = f"{kind} {name}"
        self._function = load_function(kind, name)
        self._arguments = arguments
        if is_asynchronous(self._function):
            raise UserError(f"{self.title} is asynchronous, expected a plain function. Fix: write `def`.")
        if duplicates := sorted(arguments.keys() & set(offered)):
            raise UserError(
                f"{self.title}: its configured argument {duplicates[0]!r} has the name of something that it gets "
                f"anyway. Fix: rename the argument; these names are taken: {', '.join(offered)}."
            )
        self._names = accepted(self._function, offered)
        _check_call(self.title, self._function, [*self._names, *arguments], offered)

    def has_parameter(self, name: str) -> bool:
        """Whether the function names this parameter."""
        return name in {parameter.name for parameter in _parameters(self._function) or ()}

    def __call__(self, *, if_none: str = "", **offered: Any) -> Any:
        """Call the function with what it takes. The arguments are copies.

        Args:
            if_none: see `errors_of`.

        Raises:
            UserError: the function raised.
        """
        with errors_of(self.title, if_none=if_none):
            taken = {name: offered[name] for name in self._names}
            return self._function(**taken, **copy.deepcopy(dict(self._arguments)))


def accepted(function: Callable[..., Any], offered: Collection[str]) -> list[str]:
    """The names that `function` takes: all of them if it takes any keyword, or if its signature is unknown."""
    parameters = _parameters(function)
    if parameters is None or any(one.kind is one.VAR_KEYWORD for one in parameters):
        return list(offered)
    by_name = {one.name for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)}
    return [name for name in offered if name in by_name]


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """None if the function is not written in Python, so that its signature is unknown."""
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:
        return None


def _check_call(title: str, function: Callable[..., Any], names: Collection[str], offered: Collection[str]) -> None:
    if _parameters(function) is None:
        return
    try:
        inspect.signature(function).bind(**dict.fromkeys(names))
    except TypeError as error:
        raise UserError(
            f"{title} cannot be called: {error}. It may take {', '.join(offered)} and its configured arguments. Fix: "
            "use these names for its parameters, or configure the argument."
        ) from error


@contextmanager
def errors_of(title: str, *, passed: Collection[BaseException] = (), if_none: str = "") -> Iterator[None]:
    """Raise what the block raises as a `UserError` that names the function and the line.

    Args:
        passed: errors that are raised as they are, because they are not the function's.
        if_none: the fix if the function has used a value that is None.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        if error in passed:
            raise
        fix = if_none if if_none and "NoneType" in str(error) else "correct the function."
        raise UserError(f"{title}: {describe_error(error)}. Fix: {fix}") from error
