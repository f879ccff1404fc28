"""Parse conversations. Data sets write them in many ways; the result always has the same shape.

Example: `{"from": "human", "value": "Hi"}` becomes `{"role": "user", "content": "Hi"}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import UserError

Conversation = list[dict[str, Any]]
"""Messages with a `role` and a `content`. The content is a string, "" if the message only calls tools."""

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
"""The common roles. A chat template may support others."""
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_JSON = re.compile(r"\s*(\[\s*)?\{")
_PYTHON = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""Matches a conversation that was written with `str` instead of `json.dumps`."""
_SHOWN_CHARACTERS = 300
_CONTENT_IS_OPTIONAL_WITH = ("tool_calls", "reasoning_content", "thinking")


class _Part(BaseModel):
    """Base class of the parts of a conversation. Unknown keys are kept. A key with the value None counts as absent."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value


class _FunctionCall(_Part):
    name: str
    arguments: dict[str, Any] | str = Field(default={}, union_mode="left_to_right")

    @field_validator("arguments")
    @classmethod
    def _are_an_object(cls, arguments: dict[str, Any] | str) -> dict[str, Any] | str:
        if isinstance(arguments, str) and not isinstance(_parsed(arguments), dict):
            raise ValueError("expected an object, or the JSON text of one")
        return arguments


class _ToolCall(_Part):
    id: str | int | None = None
    type: str = "function"
    function: _FunctionCall

    @model_validator(mode="before")
    @classmethod
    def _wrapped(cls, call: Any) -> Any:
        """Add the `function` level to a call that lacks it, such as {"name": …, "arguments": …}."""
        return {"function": call} if isinstance(call, Mapping) and "function" not in call and "name" in call else call


def _text_of(content: Any) -> Any:
    """Join a list of text parts, such as `[{"type": "text", "text": "Hi"}]`. Return any other value unchanged."""
    if not isinstance(content, list):
        return content
    for part in content:
        if isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str)):
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        raise ValueError(f"expected only text parts, but one is {kind or part!r}; the trainer supports text only")
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


class _Message(_Part):
    role: str = Field(min_length=1)
    content: Annotated[str, BeforeValidator(_text_of)]
    tool_calls: list[_ToolCall] | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_the_usual_keys(cls, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        message = dict(message)
        if "role" not in message and "from" in message and "value" in message:
            role = message.pop("from")
            message = {"role": _SHAREGPT_ROLES.get(role, role), "content": message.pop("value"), **message}
        if isinstance(message.get("tool_calls"), str):
            message["tool_calls"] = _parsed(message["tool_calls"])
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
        if message.get("content") is None and any(message.get(key) for key in _CONTENT_IS_OPTIONAL_WITH):
            message["content"] = ""
        return message

    @field_validator("role")
    @classmethod
    def _usual_spelling(cls, role: str) -> str:
        usual = role.strip().lower()
        return usual if usual in ROLES else role


def parse_prompt(where: str, prompt: Any, *, nulls_are_absent: bool) -> str | Conversation:
    """Return the prompt of a row: plain text, or a checked conversation.

    Text that is the JSON of a conversation becomes that conversation, because a CSV column can only hold text.

    Args:
        where: the row of the data set, for error messages.
        nulls_are_absent: whether a None in an object means that the key is absent, as in data from Arrow.

    Raises:
        UserError: the prompt is neither; names the row, the message and the value.
    """
    if isinstance(prompt, str):
        parsed = _parsed(prompt) if _JSON.match(prompt) else None
        if parsed is None and _PYTHON.match(prompt):
            raise UserError(
                f"{where}: the prompt looks like a conversation but is not JSON: {shown(prompt)}. "
                "Fix: write it with json.dumps(messages), not with str(messages)."
            )
        if not _has_roles(parsed):
            return prompt
        prompt = parsed
    if not isinstance(prompt, list) or not prompt:
        raise UserError(f"{where}: the prompt is {shown(prompt)}; expected a string or a list of role/content objects")
    messages = drop_nulls(prompt) if nulls_are_absent else prompt
    return [_message(f"{where}, message {index}", message) for index, message in enumerate(messages)]


def parse_tools(where: str, tools: Any, *, nulls_are_absent: bool) -> list[dict[str, Any]]:
    """Return the tools of a row, a list of JSON schemas.

    They may be JSON text, because all values of a parquet column have the same type.

    Raises:
        UserError: the value is something else; names the row.
    """
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(
                f"{where}: the column 'tools' is not JSON: {error}; got {shown(tools)}, expected a list of JSON "
                "schemas of functions"
            ) from error
    elif nulls_are_absent:
        tools = drop_nulls(tools)
    if not isinstance(tools or [], list) or not all(isinstance(tool, dict) for tool in tools or []):
        raise UserError(f"{where}: the column 'tools' is {shown(tools)}; expected a list of JSON schemas of functions")
    return tools or []


def _has_roles(value: Any) -> bool:
    """Whether `value` is a message or a list of messages."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items)


def shown(value: Any) -> str:
    """Return `value` for an error message. It is cut if it is long: a message may contain an image."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def drop_nulls(value: Any) -> Any:
    """Remove keys with the value None from objects. Arrow gives all objects of a column the same keys."""
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return value


def _message(where: str, message: Any) -> dict[str, Any]:
    try:
        return _Message.model_validate(message).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        problem = first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{where}: {key + ': ' if key else ''}{problem}; got {shown(message)}, expected role/content: "
            '{"role": "user", "content": "text"}'
        ) from error


def _parsed(text: str) -> Any:
    """Return the parsed JSON, or None if `text` is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None
