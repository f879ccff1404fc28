"""Says in one line what pydantic found, without the input: a rollout has thousands of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

LONGEST_VALUE, LONGEST_MESSAGE = 80, 250


def summarize(problems: Sequence[ErrorDetails]) -> str:
    """The first of `ValidationError.errors()` with its field and value, and how many more there are.

    Example: `completions.0.logprobs.3: got nan; expected a finite number (169 more problems)`.
    """
    more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
    return f"{_first(problems[0])}{more}"


def _first(problem: ErrorDetails) -> str:
    if problem["type"] == "json_invalid":
        return f"got {shorten(problem['input'])}; expected JSON: {problem['ctx']['error']}"
    field = ".".join(str(part) for part in problem["loc"])
    where = f"{field}: " if field else ""
    if problem["type"] == "value_error":  # a validator of ours, which says what it got; the input is the whole message
        return f"{where}{problem['ctx']['error']}"
    return f"{where}got {shorten(problem.get('input'))}; {describe(problem)}"


def describe(problem: ErrorDetails) -> str:
    """`expected a valid integer`."""
    if problem["type"] == "string_pattern_mismatch":
        return f"expected text that matches {problem['ctx']['pattern']}"
    message = problem["msg"].partition(", unable to")[0]
    expected = message.removeprefix("Input should be ")
    if expected == message:
        return message
    return f"expected {'a number ' if expected.startswith(('greater', 'less')) else ''}{expected}"


def shorten(value: Any) -> str:
    """Its repr, cut in the middle."""
    text = repr(value)
    half = LONGEST_VALUE // 2
    return text if len(text) <= LONGEST_VALUE else f"{text[:half]}…{text[-half:]}"


def one_line(error: BaseException) -> str:
    """What a library says, without its line breaks, and cut where it begins to list everything that there is.

    Example: `KeyError: 'added_tokens'`. The type is left out where the text says enough by itself.
    """
    if isinstance(error, ValidationError):
        text = summarize(error.errors())
    else:
        speaks = isinstance(error, ValueError | OSError | RuntimeError) and str(error)
        text = str(error) if speaks else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text.rstrip(".!") if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"
