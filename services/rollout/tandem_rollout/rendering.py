"""Turn messages into the token ids that the policy sees.

A chat template can render a conversation, but it cannot say which of the tokens belong to which message. *Twin
rendering* finds out what it writes behind a sampled turn: render the conversation twice, with a different text and
different tool arguments in that turn. What both texts end in alike is what follows the turn. For example:

    <|im_start|>assistant\\nyes<|im_end|>\\n<|im_start|>user\\nGo on.<|im_end|>\\n<|im_start|>assistant\\n
    <|im_start|>assistant\\nno<|im_end|>\\n<|im_start|>user\\nGo on.<|im_end|>\\n<|im_start|>assistant\\n
                             └─ from here on, both are alike

The turn stands where it stands in the real conversation, so the template treats it as it treats the real turn.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import UserError

Conversation = list[dict[str, Any]]
"""Messages with a `role` and a `content`."""
Schema = dict[str, Any]
"""JSON schema of a tool, as chat templates expect it."""
Render = Callable[[Conversation, Sequence[Schema]], str]
"""Applies the chat template to messages and tools. The text ends where the policy speaks next."""

_TWINS = ("yes", "no")
"""Texts that begin and end with different characters."""
_PROBE = "tandem 42"
PROBE_CALL_ID = "probe0000"
"""Some templates accept only ids of nine letters and digits."""
_REMEMBERED_TEXTS = 256
"""How many tokenized texts are kept."""


class Renderer:
    """Renders and tokenizes conversations for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, render: Render, end_of_turn: Iterable[int] = ()) -> None:
        """
        Args:
            end_of_turn: tokens that end a turn: the end-of-sequence tokens in the model's generation config, and the
                configured stop tokens. The tokenizer's own end-of-sequence token is added.
        """
        self.text = render
        eos = tokenizer.eos_token_id
        self.end_of_turn = frozenset(end_of_turn) | ({eos} if eos is not None else set())
        self._tokenizer = tokenizer
        # All episodes of a row begin with the same text.
        self._tokens = functools.lru_cache(_REMEMBERED_TEXTS)(self._tokenized)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Tokenize text that contains its special tokens already."""
        return self._tokens(text)

    def _tokenized(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)

    def decoded(self, token_ids: Sequence[int]) -> str:
        """Return the exact text of the tokens, special tokens included."""
        return str(
            self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def ends_turn(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token ends a turn. If the turn was cut off, it does not."""
        return bool(token_ids) and token_ids[-1] in self.end_of_turn

    def after_turn(self, messages: Conversation, end: int, tools: Sequence[Schema]) -> tuple[int, ...] | None:
        """Return the tokens that the template writes behind a turn, beginning with its end-of-turn token if it has one.

        Args:
            end: number of messages up to and with the turn, which is `messages[end - 1]`. At least one follows.

        Returns:
            The tokens, or None if they cannot be found: the template does not show the turn, it does not say where its
            tool calls end, or it does not show the following messages there.
        """
        found = (self._behind(messages, end, tools, twins) for twins in _twins_of(messages[end - 1]))
        return next((tokens for tokens in found if tokens is not None), None)

    def _behind(
        self, messages: Conversation, end: int, tools: Sequence[Schema], twins: Sequence[dict[str, Any]]
    ) -> tuple[int, ...] | None:
        one, other = (self.text([*messages[: end - 1], twin, *messages[end:]], tools) for twin in twins)
        if one == other:
            return None
        tokens = self.tokens(_common_end(one, other))
        ends = (index for index, token in enumerate(tokens) if token in self.end_of_turn)
        # Behind the varied arguments, the twins also share the end of the call, such as `}</tool_call>`.
        start = next(ends, None if messages[end - 1].get("tool_calls") else 0)
        if start is None or not _shows(self.decoded(tokens[start:]), messages[end:]):
            return None
        return tokens[start:]


def _common_end(one: str, other: str) -> str:
    """Return the longest text that both end in. A binary search compares long texts faster than a loop in Python."""
    same, different = 0, min(len(one), len(other)) + 1
    while different - same > 1:
        size = (same + different) // 2
        if one.endswith(other[len(other) - size :]):
            same = size
        else:
            different = size
    return one[len(one) - same :]


def _shows(text: str, messages: Conversation) -> bool:
    """Whether the text contains what the messages say, as it is or as JSON. White space does not matter.

    Turns of the assistant do not count, because templates drop thinking.
    """
    squeezed = _squeezed(text)
    contents = [message.get("content") or "" for message in messages if message["role"] != "assistant"]
    forms = [(content, json.dumps(content, ensure_ascii=False)[1:-1]) for content in contents]
    return all(any(_squeezed(form) in squeezed for form in either) for either in forms)


def _squeezed(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())  # tokenizers may normalize


def _twins_of(turn: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Yield pairs of turns that differ from `turn` in what they say.

    The first pair keeps the form of the turn: templates treat a turn without text differently. The others are for
    turns with text and calls, in templates that write the text behind the results, or show no calls.
    """
    says = bool(turn.get("content"))
    calls = turn.get("tool_calls") or []
    yield [_saying(turn, text, says or not calls) for text in _TWINS]
    yield [_saying({**turn, "content": ""}, text, False) for text in _TWINS]
    yield [_saying(turn, text, True) for text in _TWINS]


def _saying(turn: dict[str, Any], text: str, with_content: bool) -> dict[str, Any]:
    said: dict[str, Any] = {**turn, "content": text} if with_content else dict(turn)
    if calls := turn.get("tool_calls"):
        said["tool_calls"] = [{**call, "function": _called_with(call["function"], text)} for call in calls]
    return said


def _called_with(function: dict[str, Any], text: str) -> dict[str, Any]:
    arguments: Any = {text: text}
    return {**function, "arguments": json.dumps(arguments) if isinstance(function["arguments"], str) else arguments}


def check_template(renderer: Renderer, tools: Sequence[Schema] = (), *, answers_in_text: bool = False) -> None:
    """Try whether the chat template can render an episode of several turns.

    Args:
        tools: the tools of the environment. If there are any, a tool call and its result are tried.
        answers_in_text: whether the environment answers with messages of the user.

    Raises:
        UserError: it cannot. The message says what is missing.
    """
    asked = {"role": "user", "content": "Hi."}
    if answers_in_text:
        said = {"role": "assistant", "content": "Hello."}
        _check(renderer, [asked, said, {"role": "user", "content": _PROBE}], tools, "a second message of the user")
    if tools:
        name = tools[0]["function"]["name"]
        call = {"id": PROBE_CALL_ID, "type": "function", "function": {"name": name, "arguments": {"a": "b"}}}
        answer = {"role": "tool", "tool_call_id": PROBE_CALL_ID, "name": name, "content": _PROBE}
        for text in ("", "Hm."):
            called = {"role": "assistant", "content": text, "tool_calls": [call]}
            _check(renderer, [asked, called, answer], tools, "the result of a tool call")


def _check(renderer: Renderer, messages: Conversation, tools: Sequence[Schema], what: str) -> None:
    fix = (
        "Fix: choose a model whose chat template renders it, give another template "
        "(trainer.prompts.chat_template_kwargs: {chat_template: …}), or add the token that ends a turn to "
        "trainer.rollout.stop_token_ids."
    )
    try:
        tokens = renderer.after_turn(messages, 2, tools)
    except Exception as error:  # a template can raise anything: it is a program by the model's authors
        raise UserError(f"the model's chat template refuses {what}: {error}. {fix}") from error
    if tokens is None:
        raise UserError(
            f"the model's chat template does not show {what} behind the assistant's turn, which ends in one of the "
            f"tokens {sorted(renderer.end_of_turn)}. It renders {renderer.text(messages, tools)!r}. {fix}"
        )
