"""Tool calls are read as the model writes them. What cannot be read is a problem that the policy hears of."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from support.episodes import RESPONSE_TEMPLATE, WITH_TOOLS, bpe_tokenizer, renderer
from tandem_rollout.errors import UserError
from tandem_rollout.tools import ToolCall
from tandem_rollout.turns import Turn, TurnReader

ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "a"}}},
    },
}
CALL = ToolCall("add", {"a": 1})


def reader(name: str = "Qwen 3", *, response_template: Any = None, **options: Any) -> TurnReader:
    tokenizer = copy.copy(bpe_tokenizer())
    tokenizer.response_template = response_template
    return TurnReader(tokenizer, renderer(name), schemas=[ADD], **options)


def read(one: TurnReader, text: str, prompt: str = "<|im_start|>assistant\n") -> Turn:
    tokenizer = bpe_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return one.read(ids, tokenizer(prompt, add_special_tokens=False).input_ids, [ADD])


HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Qwen 3", HERMES + "<|im_end|>"),
        ("Qwen 2.5", HERMES + "<|im_end|>"),
        ("Llama 3", '{"name": "add", "parameters": {"a": 1}}<|eot_id|>'),
        ("Mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]</s>'),
    ],
)
def test_the_parser_is_the_one_that_reads_what_the_template_writes(name: str, text: str) -> None:
    turn = read(reader(name), text)
    assert turn.calls == (CALL,)
    assert turn.message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00000", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    }


@pytest.mark.parametrize("name", ["DeepSeek R1", "InternLM", "one that takes strings and parts"])
def test_a_format_that_nothing_reads_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(UserError, match=r"has no response_template.*Fix: set trainer\.rollout\.tool_parser") as caught:
        reader(name)
    assert "add" in str(caught.value)  # shows how the template writes a call


def test_an_unknown_parser_is_refused() -> None:
    with pytest.raises(UserError, match="got 'hermse', expected one of hermes, llama3, mistral, or module:function"):
        reader(tool_parser="hermse")


@pytest.mark.parametrize("template", [None, RESPONSE_TEMPLATE])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"Let me see.\n{HERMES}<|im_end|>", "Let me see.", [CALL]),
        (f"{HERMES}\n{HERMES}<|im_end|>", "", [CALL, CALL]),
        ('<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>', "", [CALL]),
        ('<tool_call>{"name":"add","arguments":{"a":1}}', "", [CALL]),
        ('<tool_call>{"name": "nothing"}</tool_call>', "", [ToolCall("nothing", {})]),
        (
            '<tool_call>{"name": "add", "arguments": {"a": "Grüße 🙂\\ud83d"}}</tool_call>',
            "",
            [ToolCall("add", {"a": "Grüße 🙂\ufffd"})],
        ),
        ("No call: {}.<|im_end|>", "No call: {}.", []),
        ("", "", []),
    ],
)
def test_calls_and_text_are_separated(template: Any, text: str, content: str, calls: list[ToolCall]) -> None:
    turn = read(reader(response_template=template), text)
    assert turn.problem is None
    assert list(turn.calls) == calls
    assert turn.message["content"].strip() == content


@pytest.mark.parametrize("template", [None, RESPONSE_TEMPLATE])
@pytest.mark.parametrize(
    "call",
    [
        *('{"name": "add", "arguments": {"a": 1}', "add(a=1)", "", "[1, 2]", '{"arguments": {}}', '{"name": 3}'),
        *(
            '{"name": "add", "arguments": [1]}',
            '{"name": "add", "arguments": "no"}',
            '{"name": "add", "arguments": null}',
        ),
        *('{"name": "add", "arguments": {"a": NaN}}', '{"name": "", "arguments": {}}'),
        '{"name": "add", "arguments": {"a": ' + "[" * 40 + "]" * 40 + "}}",
        '{"name": "add", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}",
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_malformed_call_is_a_problem_and_the_turn_is_text(template: Any, call: str) -> None:
    text = f"Hm.<tool_call>{call}</tool_call>"
    turn = read(reader(response_template=template), text + "<|im_end|>")
    assert turn.calls == ()
    assert turn.problem
    assert turn.message == {"role": "assistant", "content": text}


def test_a_call_within_the_thinking_is_not_carried_out() -> None:
    one = reader()
    thought = f"<think>I could {HERMES}</think>\n\n"
    assert read(one, f"{thought}42<|im_end|>") == Turn({"role": "assistant", "content": f"{thought}42"})
    assert read(one, f"{thought}{HERMES}").calls == (CALL,)
    assert read(one, f"I could {HERMES}</think>done", "<|im_start|>assistant\n<think>\n").calls == ()
    assert read(one, f"I could {HERMES}", "<|im_start|>assistant\n<think>\n").calls == ()
    assert read(one, f"<think>I could {HERMES}").calls == ()


def test_a_response_template_keeps_the_thinking_apart() -> None:
    turn = read(reader(response_template=RESPONSE_TEMPLATE), f"<think>\nhm\n</think>\n\nSo:{HERMES}<|im_end|>")
    assert turn.message["reasoning_content"].strip() == "hm"
    assert (turn.message["content"], turn.calls) == ("So:", (CALL,))


def test_a_template_that_shows_one_call_per_turn_gets_one() -> None:
    call = '{"name": "add", "parameters": {"a": 1}}'
    turn = read(reader("Llama 3"), f"{call}; {call}<|eot_id|>")
    assert turn.calls == (CALL,)
    assert len(turn.message["tool_calls"]) == 1
    assert turn.problem == "got 2 tool calls, expected one at a time: only the first was carried out"


def test_json_that_is_no_call_is_text_for_llama() -> None:
    one = reader("Llama 3")
    assert read(one, '{"answer": 3}<|eot_id|>') == Turn({"role": "assistant", "content": '{"answer": 3}'})
    assert read(one, '{"name": "add", "parameters": {"a"').problem
    assert read(one, '<|python_tag|>{"name": "add", "parameters": {"a": 1}}').calls == (CALL,)


def test_a_parser_of_the_project_is_used_even_if_there_is_a_response_template() -> None:
    def parse(text: str) -> tuple[str, list[tuple[str, Any]]]:
        said, mark, number = text.partition("!add ")
        return said, [("add", {"a": int(number)})] if mark else []

    one = reader(tool_parser=parse, response_template=RESPONSE_TEMPLATE)
    assert read(one, "So: !add 1<|im_end|>").calls == (CALL,)
    assert "invalid literal" in str(read(one, "!add one").problem)


def test_an_error_of_the_projects_parser_is_not_blamed_on_the_policy() -> None:
    def parse(text: str) -> Any:
        return {"a": text}["x"]

    with pytest.raises(UserError, match="tool_parser parse: KeyError: 'x'"):
        read(reader(tool_parser=parse), "Hi.")


def test_without_tools_a_turn_is_its_text_without_special_tokens() -> None:
    one = TurnReader(bpe_tokenizer(), renderer("Qwen 3"))
    ids = bpe_tokenizer()(f"a<|im_start|>b {HERMES}<|im_end|>", add_special_tokens=False).input_ids
    assert one.read(ids) == Turn({"role": "assistant", "content": f"ab {HERMES}"})


def test_special_tokens_within_a_turn_are_not_part_of_its_text() -> None:
    assert read(reader(), f"a<|im_start|>b</s>c{HERMES}<|im_end|>").message["content"] == "abc"


@pytest.mark.parametrize("name", ["Qwen 3", "Qwen 2.5", "Llama 3", "Mistral", "Qwen 3, thinking"])
def test_a_call_survives_being_written_by_the_template(name: str) -> None:
    assert name in WITH_TOOLS
    one, by = reader(name), renderer(name)
    arguments: list[dict[str, Any]] = [{}, {"a": 1}, {"a": 'x" \\ \n Grüße 🙂', "b": [1, {"c": None}]}, {"<": "</tool"}]
    for given in arguments:
        function = {"name": "add", "arguments": given}
        called = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call00000", "type": "function", "function": function}],
        }
        result = {"role": "tool", "tool_call_id": "call00000", "name": "add", "content": "3"}
        user = {"role": "user", "content": "Hi."}
        text = by.text([user, called, result], [ADD]).removeprefix(by.text([user], [ADD]))
        ids = by.tokens(text)
        turn = one.read(ids[: next(i for i, token in enumerate(ids) if token in by.end_of_turn) + 1], (), [ADD])
        assert turn.calls == (ToolCall("add", given),)


def test_no_sample_of_any_tokens_breaks_a_reader() -> None:
    """A policy early in training samples anything."""
    chance = random.Random(0)
    vocabulary = len(bpe_tokenizer())
    pieces = [
        "<tool_call>",
        '{"name": "add", ',
        '"arguments": ',
        '{"a": 1}}',
        "</tool_call>",
        "<think>",
        "</think>",
        '{"name"',
    ]
    prompt = bpe_tokenizer()("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    readers = [reader(), reader(response_template=RESPONSE_TEMPLATE), reader("Llama 3"), reader("Mistral")]
    for _ in range(300):
        ids = [chance.randrange(vocabulary) for _ in range(chance.randint(0, 8))]
        for _ in range(chance.randint(0, 6)):
            piece = bpe_tokenizer()(chance.choice(pieces), add_special_tokens=False).input_ids
            at = chance.randint(0, len(ids))
            ids[at:at] = piece
        for one in readers:
            turn = one.read(ids, prompt, [ADD])
            json.dumps(turn.message, ensure_ascii=False, allow_nan=False).encode()
            assert len(turn.message.get("tool_calls", [])) == len(turn.calls)
