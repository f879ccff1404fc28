"""A model whose chat template cannot render an episode is refused at the start, with what is missing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import normalizers

from support.episodes import ALL_TEMPLATES, WITH_TOOLS, bpe_tokenizer, renderer
from tandem_rollout.errors import UserError
from tandem_rollout.rendering import check_template

ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}
PLAIN = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '|' }}{% endfor %}a:"
"""A template without an end-of-turn token."""


@pytest.mark.parametrize("name", ALL_TEMPLATES)
def test_every_template_can_render_a_conversation(name: str) -> None:
    check_template(renderer(name), answers_in_text=True)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_templates_with_tools_can_render_an_episode_with_tools(name: str) -> None:
    check_template(renderer(name), [ADD], answers_in_text=True)


@pytest.mark.parametrize(
    ("chat_template", "end_of_turn", "message"),
    [
        (ALL_TEMPLATES["Phi 3"], "<|end|>", "does not show the result of a tool call"),
        (ALL_TEMPLATES["Gemma"], "<end_of_turn>", "refuses the result of a tool call: .*Roles must alternate"),
        (PLAIN, "<|im_end|>", r"does not show the result of a tool call .* one of the tokens \[2, 4\]"),
    ],
)
def test_a_template_without_tools_is_refused_if_there_are_tools(
    chat_template: str, end_of_turn: str, message: str
) -> None:
    one = renderer("", chat_template=chat_template, end_of_turn=end_of_turn)
    with pytest.raises(UserError, match=message) as caught:
        check_template(one, [ADD])
    assert "Fix: choose a model" in str(caught.value)


def test_a_token_that_ends_only_other_turns_is_refused() -> None:
    only_the_users = "{% for m in messages %}{{ m.content + ('' if m.role == 'assistant' else '</s>') }}{% endfor %}"
    with pytest.raises(UserError, match="does not show a second message of the user"):
        check_template(renderer("", chat_template=only_the_users), answers_in_text=True)


def test_text_can_follow_a_turn_without_an_end_of_turn_token() -> None:
    one = renderer("", chat_template=PLAIN)
    check_template(one, answers_in_text=True)
    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    behind = one.after_turn(messages, 2, ())
    assert behind is not None
    assert one.decoded(behind) == "|u:c|a:"


def test_the_end_of_a_turn_is_not_searched_within_a_tool_call() -> None:
    """Both twins end their call with the same characters, which belong to the sampled turn."""
    one = renderer("Qwen 2.5")
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "name": "add", "content": "3"},
    ]
    behind = one.after_turn(messages, 2, [ADD])
    assert behind is not None
    assert one.decoded(behind).startswith("<|im_end|>\n<|im_start|>user\n<tool_response>\n3\n")


def test_a_turn_that_says_what_a_twin_says_is_found_too() -> None:
    one = renderer("ChatML")
    for said in ("yes", "no", "", "yes<|im_end|>"):
        messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", said), ("user", "c"))]
        behind = one.after_turn(messages, 2, ())
        assert behind is not None
        assert one.decoded(behind) == "<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"


def test_a_turn_without_text_keeps_its_form() -> None:
    """Templates may end a turn with text and calls differently from one that only calls."""
    by_form = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "{{ '<|im_end|>' if m.content else '<|im_end|>\\n\\n' }}{% endfor %}"
    )
    one = renderer("", chat_template=by_form, end_of_turn="<|im_end|>")
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    result = {"role": "tool", "tool_call_id": "x", "name": "add", "content": "3"}
    for content, expected in (("", "<|im_end|>\n\ntool:3<|im_end|>"), ("Hm.", "<|im_end|>tool:3<|im_end|>")):
        called = {"role": "assistant", "content": content, "tool_calls": [call]}
        behind = one.after_turn([{"role": "user", "content": "a"}, called, result], 2, [ADD])
        assert behind is not None
        assert one.decoded(behind) == expected


def test_calls_that_the_template_does_not_show_are_no_obstacle() -> None:
    """The policy's own tokens show the call. ChatML's template renders the result, but not the call."""
    one = renderer("ChatML")
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    result = {"role": "tool", "tool_call_id": "x", "name": "add", "content": "3"}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    behind = one.after_turn([{"role": "user", "content": "a"}, called, result], 2, ())
    assert behind is not None
    assert one.decoded(behind) == "<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"


def test_a_message_is_recognized_if_the_tokenizer_normalizes_it() -> None:
    tokenizer = copy.deepcopy(bpe_tokenizer())
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    one = renderer("ChatML", tokenizer=tokenizer)
    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "e\u0301"))]
    behind = one.after_turn(messages, 2, ())
    assert behind is not None
    assert "é" in one.decoded(behind)


def test_a_system_message_that_the_template_moves_to_the_front_is_not_lost() -> None:
    """It is not behind the turn, so the turn cannot be continued."""
    to_the_front = (
        "{% for m in messages if m.role == 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content }}<|im_end|>{% endfor %}assistant:"
    )
    one = renderer("", chat_template=to_the_front, end_of_turn="<|im_end|>")
    said = (("user", "a"), ("assistant", "b"), ("system", "Be brief."), ("user", "c"))
    assert one.after_turn([{"role": r, "content": c} for r, c in said], 2, ()) is None
