"""Render a conversation to the text that the model sees.

Chat templates expect messages in different forms. For example, Qwen's template writes tool arguments as JSON, and
DeepSeek's expects them as JSON text already. Most templates expect `content` as a string; those of vision models expect
a list of parts. Therefore each conversation is rendered in one form after another, until the text contains everything
that the messages say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .conversations import Conversation, shown
from .errors import UserError

_MAY_BE_LEFT_OUT = frozenset({"system", "developer", "assistant", "tool"})
"""Roles whose messages a template may ignore. Many drop the system message, or the reasoning of earlier turns."""


class Form(NamedTuple):
    """One way to pass a conversation to a template."""

    content_in_parts: bool = False
    arguments_as_text: bool = False
    no_content: str | None = ""
    """The `content` of a message that only calls tools."""


_PLAIN_FORMS = (Form(), Form(content_in_parts=True))
_TOOL_FORMS = tuple(Form(*choices) for choices in product((False, True), (False, True), ("", None)))


class Rendered(NamedTuple):
    text: str
    left_out: tuple[int, ...]
    """Indices of the messages that the text does not contain."""


def render(
    where: str,
    messages: Conversation,
    tools: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
) -> Rendered:
    """Apply the chat template so that the text ends where the assistant speaks next.

    If the last message is the assistant's, the text ends inside it and the model continues it.

    Args:
        where: the row of the data set, for error messages.
        template_kwargs: more variables for the template. `continue_final_message: false` closes the last message
            of the assistant and opens a new turn.

    Raises:
        UserError: the template fails for all forms of the conversation, or it leaves out a message of the user.
    """
    messages, options = _ending(where, messages, template_kwargs)
    best: Rendered | None = None
    refusal: Exception | None = None
    has_tool_calls = any("tool_calls" in message for message in messages)
    for form in _TOOL_FORMS if has_tool_calls else _PLAIN_FORMS:
        try:
            text = str(
                tokenizer.apply_chat_template(
                    list(_encoded(messages, form)), tools=list(tools) or None, tokenize=False, **options
                )
            )
        except Exception as error:  # a template can raise anything: it is a program by the model's authors
            refusal = refusal or error
            continue
        left_out = tuple(i for i, message in enumerate(messages) if not _shows(text, message, form))
        if best is None or len(left_out) < len(best.left_out):
            best = Rendered(text, left_out)
        if not left_out:
            break
    if best is None:
        raise UserError(f"{where}: the model's chat template refuses the prompt: {refusal}") from refusal
    if lost := [i for i in best.left_out if messages[i]["role"] not in _MAY_BE_LEFT_OUT]:
        raise UserError(
            f"{where}: the model's chat template leaves out message {lost[0]}, {shown(messages[lost[0]])}. Its text is "
            f"{shown(best.text)}. Fix: use a role that the template knows, or another template "
            "(trainer.prompts.chat_template_kwargs: {chat_template: …})."
        )
    return best


def _ending(
    where: str, messages: Conversation, template_kwargs: Mapping[str, Any]
) -> tuple[Conversation, dict[str, Any]]:
    """Return the messages to render, and the template's options, including the one that decides how the text ends."""
    options = dict(template_kwargs)
    continued = options.pop("continue_final_message", True)
    opened = options.pop("add_generation_prompt", True)
    last = messages[-1]
    if last["role"] != "assistant" or not continued:
        return messages, {**options, "add_generation_prompt": opened}
    if "tool_calls" in last:
        raise UserError(
            f"{where}: the conversation ends with a tool call, {shown(last['tool_calls'])}. "
            "Fix: add the message with the tool's answer, or remove the call."
        )
    if last.keys() == {"role", "content"} and not last["content"]:  # an empty message: the turn begins
        return messages[:-1], {**options, "add_generation_prompt": True}
    return messages, {**options, "continue_final_message": continued}


def _encoded(messages: Conversation, form: Form) -> Iterator[dict[str, Any]]:
    for message in messages:
        content: Any = message["content"]
        if "tool_calls" in message and not content:
            content = form.no_content
        elif form.content_in_parts:
            content = [{"type": "text", "text": content}]
        encoded = {**message, "content": content}
        if calls := message.get("tool_calls"):
            encoded["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _arguments(call, form)}} for call in calls
            ]
        yield encoded


def _arguments(call: dict[str, Any], form: Form) -> dict[str, Any] | str:
    arguments = call["function"]["arguments"]
    if isinstance(arguments, str):
        return arguments if form.arguments_as_text else dict(json.loads(arguments))
    return json.dumps(arguments, ensure_ascii=False) if form.arguments_as_text else dict(arguments)


def _shows(text: str, message: dict[str, Any], form: Form) -> bool:
    """Whether `text` contains what `message` says. White space is ignored."""
    said = [message["content"]] if message["role"] != "assistant" else []
    calls = message.get("tool_calls", ())
    called = [call["function"]["name"] for call in calls]
    wrong = [_wrongly_written(_arguments(call, form)) for call in calls]
    return all(_contains(text, part) for part in [*said, *called]) and not any(w and w in text for w in wrong)


def _contains(text: str, part: str) -> bool:
    if part.strip() in text:
        return True
    squeezed = "".join(text.split())
    return any("".join(form.split()) in squeezed for form in (part, json.dumps(part, ensure_ascii=False)[1:-1]))


def _wrongly_written(arguments: dict[str, Any] | str) -> str:
    """Return the arguments as a template writes them if it expects the other form; "" if both forms look the same."""
    if isinstance(arguments, str):
        return json.dumps(arguments, ensure_ascii=False)
    return repr(arguments) if arguments else ""
