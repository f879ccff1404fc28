"""Read the tool calls of a turn. How a call is written depends on the model.

For example, Qwen writes `<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>`. Many models come with a
`response_template`, by which transformers reads their turns. For others there is a table of parsers. A project can
bring its own: a function that takes the text of a turn, and returns the text without the calls, and the calls as pairs
of a name and arguments. It raises `ValueError` for a call that it cannot read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .errors import UserError
from .rendering import PROBE_CALL_ID, Renderer, Schema
from .tools import ToolCall

TextParser = Callable[[str], tuple[str, Sequence[tuple[str, Any]]]]
"""Text of a turn → its text without the calls, and the calls: name and arguments."""

_PREFIX_TOKENS = 256
"""How many of the prompt's last tokens a parser sees: enough for what the template writes into a turn."""


class Parsed(NamedTuple):
    """A turn, not yet checked."""

    message: dict[str, Any]
    """`content`, and perhaps the thinking."""
    calls: Sequence[tuple[Any, Any]]
    """Names and arguments."""


Parser = Callable[[str, Sequence[int], Sequence[Schema]], Parsed]
"""Text of the turn, tokens of the prompt, tools → message and calls. Raises `ValueError` for an unreadable call."""


class ParserFailed(Exception):
    """The project's parser has an error. It is not a `ValueError`: the policy has not caused it."""


def as_message_call(number: int, call: ToolCall) -> dict[str, Any]:
    """Return the call as part of a message. Some templates accept only ids of nine letters and digits."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call{number:05d}", "type": "function", "function": function}


def hermes(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """`<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>`: Hermes, Qwen 2.5, Qwen 3."""
    said, *called = re.split(r"<tool_call>", text)
    calls = []
    for part in called:
        call, _, after = part.partition("</tool_call>")
        calls.append(_call(json.loads(call)))
        said += after
    return said, calls


def llama3(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """`{"name": "add", "parameters": {"a": 1}}`, and several of them with `;` in between: Llama 3."""
    rest = text.strip().removeprefix("<|python_tag|>").strip()
    if not re.match(r'\{\s*"(name|type)"', rest):
        return text, []
    calls = []
    while rest:
        call, end = json.JSONDecoder().raw_decode(rest)
        calls.append(_call(call))
        rest = rest[end:].lstrip("; \n")
    return "", calls


def mistral(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """`[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]`: Mistral."""
    said, mark, called = text.partition("[TOOL_CALLS]")
    calls = json.loads(called) if mark else []
    if not isinstance(calls, list):
        raise ValueError(f"got {called.strip()[:80]!r} behind [TOOL_CALLS], expected a list")
    return said, [_call(call) for call in calls]


def _call(call: Any) -> tuple[str, Any]:
    if not isinstance(call, dict) or "name" not in call:
        raise ValueError(f'got the tool call {str(call)[:80]!r}, expected {{"name": …, "arguments": {{…}}}}')
    return call["name"], call.get("arguments", call.get("parameters", {}))


PARSERS: dict[str, TextParser] = {"hermes": hermes, "llama3": llama3, "mistral": mistral}
"""The table of parsers, for models without a response template."""


def choose_parser(
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    schemas: Sequence[Schema],
    tool_parser: str | TextParser | None,
) -> Parser:
    """Return what reads the tool calls of this model.

    Args:
        tool_parser: a name in `PARSERS`, or a function of the project. None: the tokenizer's response template, or the
            parser in the table that reads what the chat template writes.

    Raises:
        UserError: nothing can.
    """
    if isinstance(tool_parser, str):
        if tool_parser not in PARSERS:
            raise UserError(
                f"trainer.rollout.tool_parser: got {tool_parser!r}, expected one of {', '.join(PARSERS)}, or "
                "module:function for a parser of the project."
            )
        return _of_text(PARSERS[tool_parser], renderer)
    if tool_parser is not None:
        return _of_text(tool_parser, renderer)
    if getattr(tokenizer, "response_template", None) is not None:
        return _by_response_template(tokenizer, renderer)
    written = _written_call(renderer, schemas)
    for parser in PARSERS.values():
        if _reads(parser, written, schemas):
            return _of_text(parser, renderer)
    raise UserError(
        f"the model's tokenizer has no response_template, and none of the parsers {', '.join(PARSERS)} reads a tool "
        f"call as its chat template writes it: {written!r}. Fix: set trainer.rollout.tool_parser: module:function, a "
        "function that takes the text of a turn, and returns its text without the calls, and the calls as pairs of a "
        "name and arguments."
    )


def _of_text(parser: TextParser, renderer: Renderer) -> Parser:
    def parse(text: str, prompt_ids: Sequence[int], schemas: Sequence[Schema]) -> Parsed:
        del schemas
        thought, said = _thinking(text, renderer.decoded(prompt_ids[-_PREFIX_TOKENS:]))
        try:
            said, calls = parser(said)
        except (ValueError, RecursionError):
            raise
        except Exception as error:
            name = getattr(parser, "__name__", parser)
            raise ParserFailed(f"trainer.rollout.tool_parser {name}: {type(error).__name__}: {error}") from error
        return Parsed({"content": thought + said}, calls)

    return parse


def _thinking(text: str, prefix: str) -> tuple[str, str]:
    """Divide a turn into thinking and the rest. A call that the policy only thinks about is not carried out."""
    thought, mark, said = text.rpartition("</think>")
    if mark:
        return thought + mark, said
    unfinished = "<think>" in text or prefix.rstrip().endswith("<think>")
    return (text, "") if unfinished else ("", text)


def _by_response_template(tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> Parser:
    def parse(text: str, prompt_ids: Sequence[int], schemas: Sequence[Schema]) -> Parsed:
        prefix = renderer.decoded(prompt_ids[-_PREFIX_TOKENS:])
        try:
            message = dict(tokenizer.parse_response(text, prefix=prefix, tools=list(schemas)))
            calls = [call["function"] for call in message.pop("tool_calls", None) or ()]
            return Parsed(message, [_call(call) for call in calls])
        except (TypeError, KeyError) as error:
            raise ValueError(f"the tool call cannot be read: {error}") from error

    return parse


def _probe(schemas: Sequence[Schema], calls: int) -> list[dict[str, Any]]:
    """A conversation with tool calls and their results."""
    name = schemas[0]["function"]["name"]
    called = [
        {**as_message_call(number, ToolCall(name, {"a": "b"})), "id": f"{PROBE_CALL_ID[:-1]}{number}"}
        for number in range(calls)
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "name": name, "content": "c"} for call in called]
    return [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "", "tool_calls": called}, *results]


def accepts_two_calls(renderer: Renderer, schemas: Sequence[Schema]) -> bool:
    """Whether the chat template can render two calls in one turn."""
    try:
        renderer.text(_probe(schemas, 2), schemas)
    except Exception:  # a template can raise anything: it is a program by the model's authors
        return False
    return True


def _written_call(renderer: Renderer, schemas: Sequence[Schema]) -> str:
    """Return a tool call as the chat template writes it."""
    messages = _probe(schemas, 1)
    opened, full = renderer.text(messages[:1], schemas), renderer.text(messages, schemas)
    tokens = renderer.tokens(full.removeprefix(opened))
    end = next((index for index, token in enumerate(tokens) if token in renderer.end_of_turn), len(tokens))
    return renderer.decoded(tokens[:end])


def _reads(parser: TextParser, written: str, schemas: Sequence[Schema]) -> bool:
    try:
        _, calls = parser(written)
    except ValueError:
        return False
    return [(name, arguments) for name, arguments in calls] == [(schemas[0]["function"]["name"], {"a": "b"})]
