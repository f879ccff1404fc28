"""Read a sampled turn: its text, its thinking, and the tools that it calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .errors import UserError
from .rendering import Renderer, Schema
from .text import without_surrogates
from .tool_calls import ParserFailed, TextParser, accepts_two_calls, as_message_call, choose_parser
from .tools import ToolCall

_DEEPEST = 32
"""How deep arguments may be nested."""


class Turn(NamedTuple):
    """What the policy said."""

    message: dict[str, Any]
    """The turn as a message of the assistant."""
    calls: tuple[ToolCall, ...] = ()
    problem: str | None = None
    """Why a tool call could not be read, in words for the policy."""


class TurnReader:
    """Turns sampled tokens into a message and tool calls."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        renderer: Renderer,
        *,
        schemas: Sequence[Schema] = (),
        tool_parser: str | TextParser | None = None,
    ) -> None:
        """
        Args:
            schemas: the tools that the policy may call.
            tool_parser: a name in `PARSERS`, or a function of the project. None: the tokenizer's response template, or
                the parser in the table that reads what the chat template writes.

        Raises:
            UserError: there are tools, and nothing can read their calls.
        """
        self._tokenizer = tokenizer
        self._renderer = renderer
        special = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(special) or "(?!)")
        self._parse = choose_parser(tokenizer, renderer, schemas, tool_parser) if schemas else None
        self._one_call = bool(schemas) and not accepts_two_calls(renderer, schemas)

    def read(self, token_ids: Sequence[int], prompt_ids: Sequence[int] = (), schemas: Sequence[Schema] = ()) -> Turn:
        """Read a turn. What cannot be read as a call is text, and a problem that the policy should know about.

        Raises:
            UserError: the project's parser has an error.
        """
        plain = without_surrogates(str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)))
        if self._parse is None or not schemas:
            return Turn({"role": "assistant", "content": plain})
        ended = self._renderer.ends_turn(token_ids)
        text = self._renderer.decoded(token_ids[:-1] if ended else token_ids)
        try:
            parsed = self._parse(text, prompt_ids, schemas)
            calls = [ToolCall(_name(name), _arguments(arguments)) for name, arguments in parsed.calls]
        except ParserFailed as error:
            raise UserError(f"{error}. Fix: correct the parser.") from error
        except (ValueError, RecursionError) as error:
            return Turn({"role": "assistant", "content": plain}, problem=str(error) or type(error).__name__)
        problem = None
        if self._one_call and len(calls) > 1:
            problem = f"got {len(calls)} tool calls, expected one at a time: only the first was carried out"
            calls = calls[:1]
        return Turn(self._message(parsed.message, calls), tuple(calls), problem)

    def _message(self, said: Mapping[str, Any], calls: Sequence[ToolCall]) -> dict[str, Any]:
        texts = {key: self._without_special(value) for key, value in said.items() if isinstance(value, str)}
        message: dict[str, Any] = {**texts, "role": "assistant", "content": texts.get("content", "")}
        if calls:
            message["tool_calls"] = [as_message_call(number, call) for number, call in enumerate(calls)]
        return message

    def _without_special(self, text: str) -> str:
        return without_surrogates(self._special.sub("", text))


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f"got {name!r} as the name of a tool, expected text")
    return without_surrogates(name)


def _arguments(arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f"got arguments of type {type(arguments).__name__}, expected an object")
    if _depth(arguments) > _DEEPEST:
        raise ValueError(f"the arguments are nested more than {_DEEPEST} levels deep")
    json.dumps(arguments, allow_nan=False)
    return without_surrogates(arguments)


def _depth(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, items), default=0)
