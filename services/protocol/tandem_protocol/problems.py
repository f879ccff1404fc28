"""Summarize validation errors in one line. The input is left out: a rollout contains thousands of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .secrets import mask

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SHOWN = 5
"""How many items `first_few` names."""
LONGEST_VALUE = 80
"""Longest value in a message, in characters. Longer values are cut."""
LONGEST_MESSAGE = 250
"""Longest message of another library, in characters. Longer messages are cut."""


def summarize(problems: Sequence[ErrorDetails]) -> str:
    """Return the first problem with its field and value, and the number of the other problems.

    Example: `completions.0.logprobs.3: got nan; expected a finite number (169 more problems)`.

    Args:
        problems: `ValidationError.errors()`, with at least one item.
    """
    more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
    return f"{_first(problems[0])}{more}"


def _first(problem: ErrorDetails) -> str:
    if problem["type"] == "json_invalid":
        return f"got {shorten(problem['input'])}; expected JSON: {problem['ctx']['error']}"
    field = ".".join(str(part) for part in problem["loc"])
    where = f"{field}: " if field else ""
    if problem["type"] == "value_error":  # one of our own validators: its message already contains the value
        return f"{where}{problem['ctx']['error']}"
    return f"{where}got {shorten(problem.get('input'))}; {describe(problem)}"


def describe(problem: ErrorDetails) -> str:
    """Return what a problem's field should have been, such as `expected a valid integer`."""
    if problem["type"] == "string_pattern_mismatch":
        return f"expected text that matches {problem['ctx']['pattern']}"
    message = problem["msg"].partition(", unable to")[0]
    expected = message.removeprefix("Input should be ")
    if expected == message:
        return message
    return f"expected {'a number ' if expected.startswith(('greater', 'less')) else ''}{expected}"


def first_few(items: Sequence[str]) -> str:
    """Return the first items in one line, with the number of the others: `a, b, c, d, e and 3 more`."""
    others = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {others} more" if others > 0 else "")


def shorten(value: Any) -> str:
    """Return the repr of `value`. If it is longer than `LONGEST_VALUE`, its middle is left out.

    Secrets are masked before that, because a part of one is not recognized any more.
    """
    text = mask(repr(value))
    half = LONGEST_VALUE // 2
    return text if len(text) <= LONGEST_VALUE else f"{text[:half]}…{text[-half:]}"


def one_line(error: BaseException) -> str:
    """Return the message of any exception as one line of at most `LONGEST_MESSAGE` characters.

    The exception's type is included if the message alone is not clear: `KeyError: 'added_tokens'`.
    """
    if isinstance(error, ValidationError):
        text = summarize(error.errors())
    else:
        is_clear = isinstance(error, ValueError | OSError | RuntimeError) and str(error)
        text = str(error) if is_clear else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text.rstrip(".!") if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"
