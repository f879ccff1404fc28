"""Tools: typed Python functions with Google docstrings, which the policy calls by name.

Example:

    def add(a: int, b: int) -> int:
        \"\"\"Add two numbers.

        Args:
            a: the first number
            b: the second number
        \"\"\"
        return a + b
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pydantic
import pydantic_core
from transformers.utils import get_json_schema

from tandem_protocol.problems import describe

from .errors import UserError
from .rendering import Schema
from .text import cut, without_surrogates
from .workers import Worker, Workers, call

_SHOWN_PROBLEMS = 3


class ToolCall(NamedTuple):
    """A call that the policy has written."""

    name: str
    arguments: dict[str, Any]


class ToolResult(NamedTuple):
    """The answer to a call."""

    text: str
    """What the policy reads. If the call failed: JSON with the key `error`."""
    failed: bool
    seconds: float


@dataclass(frozen=True)
class Tool:
    """A function that the policy can call."""

    name: str
    schema: Schema
    """What the chat template shows to the policy."""
    function: Callable[..., Any]
    """Takes the arguments by name, and checks them."""

    @classmethod
    def of(cls, function: Callable[..., Any], where: str = "tool") -> Tool:
        """Make a tool from a typed function with a Google docstring, or from one with a schema, `tool_schema`.

        Raises:
            UserError: a type or a description is missing; names the function.
        """
        name = getattr(function, "__name__", type(function).__name__)
        try:
            schema = getattr(function, "tool_schema", None) or get_json_schema(function)
        except Exception as error:  # transformers raises several types, and types may be undefined names
            raise UserError(
                f"{where} {name}: {error}. Fix: give every parameter a type and a description: a docstring with a line "
                "`name: what it is` below `Args:`."
            ) from error
        return cls(name, schema, _checking(function))

    def of_instance(self, instance: Any) -> Tool:
        """Return the tool for a method of a class, called on `instance`."""
        return replace(self, function=functools.partial(self.function, instance))


class Tools:
    """The tools of an environment."""

    def __init__(self, tools: Iterable[Tool], *, timeout_s: float, max_characters: int) -> None:
        """
        Args:
            timeout_s: time limit of a call.
            max_characters: longest result. A longer one is cut.

        Raises:
            UserError: two tools have the same name.
        """
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self._tools:
                raise UserError(
                    f"got two tools with the name {tool.name!r}, expected different names. Fix: rename one."
                )
            self._tools[tool.name] = tool
        self._timeout_s = timeout_s
        self._max_characters = max_characters

    @property
    def schemas(self) -> list[Schema]:
        """What the chat template shows to the policy."""
        return [tool.schema for tool in self._tools.values()]

    async def call(self, asked: ToolCall, worker: Worker | Workers) -> ToolResult:
        """Call a tool. Whatever goes wrong is an answer to the policy: this never raises an error of the tool."""
        begin_s = time.monotonic()
        try:
            tool = self._tools.get(asked.name)
            if tool is None:
                raise _Refused(f"there is no tool {asked.name!r}, only: {', '.join(self._tools)}")
            answer = await call(functools.partial(tool.function, **asked.arguments), worker, self._timeout_s)
            text, failed = as_text(answer), False
        except Exception as error:
            text, failed = _as_error(error), True
        text = without_surrogates(cut(text, self._max_characters))
        return ToolResult(text, failed, time.monotonic() - begin_s)


class _Refused(Exception):
    """The call cannot be carried out. The message is complete."""


def _checking(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a check and a conversion of its arguments: "7" becomes 7 for an integer parameter.

    Types that pydantic does not know are not checked.
    """
    try:
        return pydantic.validate_call(config=pydantic.ConfigDict(arbitrary_types_allowed=True))(function)
    except Exception:  # pydantic raises several types
        return function


def as_text(answer: Any) -> str:
    """Return the answer of a tool as the policy reads it: text as it is, everything else as JSON.

    Raises:
        _Refused: it is an image or bytes that are not text.
    """
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bytes | bytearray | memoryview):
        try:
            return bytes(answer).decode()
        except UnicodeDecodeError as error:
            raise _Refused(f"the tool returned {len(bytes(answer))} bytes that are not text") from error
    if isinstance(answer, list) and answer and all(isinstance(part, Mapping) and "type" in part for part in answer):
        return "".join(_text_of(part) for part in answer)  # content parts, as in a message
    if isinstance(answer, Iterator):  # it may have no end
        return str(answer)
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    try:
        return pydantic_core.to_json(answer, fallback=str, inf_nan_mode="constants").decode()
    except (ValueError, UnicodeError):  # it contains itself, or bytes
        return str(answer)


def _text_of(part: Mapping[str, Any]) -> str:
    if part["type"] != "text" or not isinstance(part.get("text"), str):
        raise _Refused(f"the tool returned a part of type {part['type']!r}, expected text")
    return str(part["text"])


def _as_error(error: Exception) -> str:
    if isinstance(error, _Refused | TimeoutError):
        message = str(error) or "no answer in time"
    elif isinstance(error, pydantic.ValidationError):
        problems = error.errors(include_url=False, include_input=False)
        message = "; ".join(f"{'.'.join(map(str, one['loc']))}: {describe(one)}" for one in problems[:_SHOWN_PROBLEMS])
    else:
        message = f"{type(error).__name__}: {error}"
    return json.dumps({"error": message}, ensure_ascii=False)
