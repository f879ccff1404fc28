"""The model sees what the user wrote, in its own chat template, however the data set writes its messages."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from support.chat_templates import CALL, CONTINUED, SYSTEM, TEMPLATES, TOOLS, TURNS, USER
from support.models import make_tokenizer
from tandem_protocol.config.rollout import PromptsConfig
from tandem_rollout.errors import UserError
from tandem_rollout.prompts import PromptRow, load_prompts

ABSENT = {"name": None, "tool_calls": None, "tool_call_id": None, "reasoning_content": None}
"""What Arrow adds to a message when other messages of the column have these keys."""


def _parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


def _with_call(**message: Any) -> list[dict[str, Any]]:
    return [TOOLS[0], {"role": "assistant", **message}, TOOLS[2]]


_CALL = {"id": "abcdefghi", **CALL}
_CALL_AS_TEXT = {**_CALL, "function": {"name": "add", "arguments": '{"a": 1, "b": "x"}'}}
SHAPES: dict[str, tuple[Any, str]] = {
    "a message": (USER, "user"),
    "a message whose other keys are null": ([{**ABSENT, **USER[0]}], "user"),
    "JSON text": (json.dumps(USER, indent=1), "user"),
    "JSON text with another key first": (json.dumps([{"name": "Ann", **USER[0]}]), "user"),
    "a text part": ([{"role": "user", "content": _parts("What is 1+1?")}], "user"),
    "two text parts": ([{"role": "user", "content": _parts("What is ", "1+1?")}], "user"),
    "ShareGPT's keys": ([{"from": "human", "value": "What is 1+1?"}], "user"),
    "a role in upper case": ([{"role": "USER ", "content": "What is 1+1?"}], "user"),
    "no tool calls": ([{"role": "user", "content": "What is 1+1?", "tool_calls": []}], "user"),
    "a system message": (SYSTEM, "system"),
    "a system message in parts": ([{"role": "system", "content": _parts("Be brief.")}, *USER], "system"),
    "several turns": (TURNS, "turns"),
    "several turns of ShareGPT's": (
        [{"from": {"assistant": "gpt", "user": "human"}[m["role"]], "value": m["content"]} for m in TURNS],
        "turns",
    ),
    "an answer that is begun": (CONTINUED, "continued"),
    "an answer that is begun, in parts": (
        [*USER, {"role": "assistant", "content": _parts("The answer", " is")}],
        "continued",
    ),
    "a call": (TOOLS, "tools"),
    "a call without content": (_with_call(tool_calls=[_CALL]), "tools"),
    "a call with empty content": (_with_call(content="", tool_calls=[_CALL]), "tools"),
    "a call with no parts": (_with_call(content=[], tool_calls=[_CALL]), "tools"),
    "a call whose arguments are text": (_with_call(content=None, tool_calls=[_CALL_AS_TEXT]), "tools"),
    "calls as text": (_with_call(content=None, tool_calls=json.dumps([_CALL])), "tools"),
    "a call with null keys": (
        [{**ABSENT, **_with_call(tool_calls=[{**_CALL, "type": None, "index": None}])[i]} for i in range(3)],
        "tools",
    ),
    "a call without its type": (
        _with_call(tool_calls=[{"id": "abcdefghi", "function": CALL["function"]}]),
        "tools",
    ),
}


def _load(tmp_path: Path, prompt: Any, template: str, **config: Any) -> PromptRow:
    tokenizer = make_tokenizer(80)
    tokenizer.chat_template = template
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": prompt}) + "\n")
    (row,) = load_prompts(PromptsConfig(source=str(path), **config), tokenizer)
    return row


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_renders_every_shape_of_messages(tmp_path: Path, name: str, shape: str):
    template, expected = TEMPLATES[name]
    prompt, key = SHAPES[shape]
    text = getattr(expected, key)
    if text is None:
        with pytest.raises(UserError, match=r"prompts\.jsonl row 0: the model's chat template refuses the prompt: \w"):
            _load(tmp_path, prompt, template)
    else:
        assert _load(tmp_path, prompt, template).text == text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "template_kwargs",
    [{"continue_final_message": True}, {"add_generation_prompt": True}, {"add_generation_prompt": False}],
)
def test_an_incomplete_answer_is_continued_with_any_options(tmp_path: Path, name: str, template_kwargs: dict[str, Any]):
    template, expected = TEMPLATES[name]
    row = _load(tmp_path, CONTINUED, template, chat_template_kwargs=template_kwargs)
    assert row.text == expected.continued


@pytest.mark.parametrize("name", TEMPLATES)
def test_continue_final_message_opens_the_answer_if_the_last_message_is_the_users(tmp_path: Path, name: str):
    template, expected = TEMPLATES[name]
    row = _load(tmp_path, USER, template, chat_template_kwargs={"continue_final_message": True})
    assert row.text == expected.user


def test_continue_final_message_false_closes_the_answer_and_opens_another(tmp_path: Path):
    template = TEMPLATES["ChatML"][0]
    row = _load(tmp_path, TURNS[:2], template, chat_template_kwargs={"continue_final_message": False})
    assert row.text.endswith("assistant\n2<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_empty_answer_at_the_end_opens_the_answer(tmp_path: Path, name: str):
    template, expected = TEMPLATES[name]
    assert _load(tmp_path, [*USER, {"role": "assistant", "content": ""}], template).text == expected.user


@pytest.mark.parametrize("name", [name for name, (_, expected) in TEMPLATES.items() if expected.tools])
def test_null_keys_that_arrow_adds_to_messages_are_removed(tmp_path: Path, name: str):
    """The rows have different keys and arguments. Arrow gives every row the keys of all rows, with the value None."""
    template, expected = TEMPLATES[name]
    other = copy.deepcopy(TOOLS)
    other[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Bern", "when": {"day": 1}}
    other[2]["reasoning_content"] = "x"
    datasets.Dataset.from_list([{"prompt": TOOLS}, {"prompt": other}]).to_parquet(tmp_path / "prompts.parquet")
    tokenizer = make_tokenizer(80)
    tokenizer.chat_template = template
    row, _ = load_prompts(PromptsConfig(source=str(tmp_path / "prompts.parquet")), tokenizer)
    assert row.text == expected.tools


def test_nulls_that_the_user_wrote_in_arguments_and_schemas_are_kept(tmp_path: Path):
    prompt = _with_call(tool_calls=[{"id": "abcdefghi", "function": {"name": "add", "arguments": {"a": None}}}])
    assert '"arguments": {"a": null}' in _load(tmp_path, prompt, TEMPLATES["Qwen 2.5"][0]).text
    schema = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    row = _load(tmp_path, USER, "{{ tools | tojson }}{{ messages[0].content }}", tools=[schema])
    assert '"default": null' in row.text


def test_reward_functions_get_messages_of_the_same_shape(tmp_path: Path):
    template = TEMPLATES["Qwen 2.5"][0]
    for shape in ("JSON text", "two text parts", "ShareGPT's keys", "a message whose other keys are null"):
        assert _load(tmp_path, SHAPES[shape][0], template).prompt == USER
    prompt: Any = _load(tmp_path, TOOLS, template).prompt
    (_, call, answer) = prompt
    assert call == {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", **CALL}]}
    assert answer == TOOLS[2]


def test_unknown_keys_of_messages_reach_the_template(tmp_path: Path):
    template = "{% for m in messages %}{{ m.reasoning_content }}{{ m.content }}{{ m.prefix }}{% endfor %}"
    prompt = [*USER, {"role": "assistant", "reasoning_content": "hm", "content": "2", "prefix": True}]
    assert _load(tmp_path, [*prompt, *USER], template).text == "What is 1+1?hm2TrueWhat is 1+1?"
    thinking = [*USER, {"role": "assistant", "reasoning_content": "First"}]
    row = _load(tmp_path, thinking, template, chat_template_kwargs={"continue_final_message": "reasoning_content"})
    assert row.text == "What is 1+1?First"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], ["the prompt is []", "role/content"]),
        (USER[0], ["role/content"]),
        (json.dumps(USER[0]), ["expected a string or a list of role/content objects"]),
        ("[{'role': 'user', 'content': 'Hi'}]", ["looks like a conversation but is not JSON", "json.dumps"]),
        ([*USER, "Hi"], ["message 1", "'Hi'"]),
        ([*USER, {"role": "user"}], ["message 1", "content", "{'role': 'user'}"]),
        ([*USER, {"role": "assistant", "content": None}, *USER], ["message 1", "content", "None"]),
        ([{"content": "Hi"}], ["message 0", "role"]),
        ([{"role": None, "content": "Hi"}], ["message 0", "role", "None"]),
        ([{"role": "", "content": "Hi"}], ["message 0", "role"]),
        ([{"role": "user", "content": 42}], ["message 0", "content", "42"]),
        ([{"role": "user", "content": {"text": "Hi"}}], ["message 0", "content"]),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], ["message 0", "image_url", "text"]),
        ([{"role": "user", "content": [{"type": "input_audio"}, {"type": "text", "text": "Hi"}]}], ["input_audio"]),
        ([{"role": "user", "content": [{"type": "text", "text": 7}]}], ["message 0", "7"]),
        ([*USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, *USER], ["message 1", "name"]),
        (_with_call(tool_calls=[{"name": "f", "arguments": "nothing"}]), ["message 1", "arguments", "nothing"]),
        (_with_call(tool_calls=[{"name": "f", "arguments": [1]}]), ["message 1", "arguments", "[1]"]),
        (_with_call(tool_calls="nothing"), ["message 1", "tool_calls"]),
        (TOOLS[:2], ["ends with a tool call", "add the message with the tool's answer"]),
        ([{"role": "user", "content": "Hi \ud83d"}], ["lone surrogate", "Hi "]),
        ("Hi \ud83d", ["lone surrogate", "'Hi '"]),
    ],
)
def test_an_invalid_prompt_is_refused_with_its_row_message_and_value(tmp_path: Path, prompt: Any, words: list[str]):
    with pytest.raises(UserError) as error:
        _load(tmp_path, prompt, TEMPLATES["ChatML"][0])
    assert all(word in str(error.value) for word in ["prompts.jsonl row 0", *words]), error.value


def test_a_template_that_leaves_out_a_message_of_the_user_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"row 0: the model's chat template leaves out message 0, .*'human'.*Fix: "):
        _load(tmp_path, [{"role": "human", "content": "Hi"}], TEMPLATES["Phi 3"][0])


def test_a_template_that_leaves_out_a_system_message_or_a_call_causes_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    _load(tmp_path, TOOLS, TEMPLATES["Phi 3"][0])
    _load(tmp_path, SYSTEM, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    assert [record.getMessage().split(": ", 1)[1][:50] for record in caplog.records] == [
        "the model's chat template leaves out message 1, {'",
        "the model's chat template leaves out message 0, {'",
    ]


def test_a_configured_chat_template_replaces_a_missing_one(tmp_path: Path):
    tokenizer = make_tokenizer(80)
    tokenizer.chat_template = None
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": USER}))
    config = PromptsConfig(source=str(tmp_path / "prompts.jsonl"))
    with pytest.raises(UserError, match="row 0 is a conversation, but the model's tokenizer has no chat template"):
        load_prompts(config, tokenizer)
    config = config.model_copy(update={"chat_template_kwargs": {"chat_template": "{{ messages[0].content }}"}})
    assert load_prompts(config, tokenizer)[0].text == "What is 1+1?"


@pytest.mark.parametrize("text", ['[{"question": "1+1?"}]', "[{", '{"a": 1}', "[1, 2]", "{{ x }}", "[]"])
def test_json_that_is_not_a_conversation_is_plain_text(tmp_path: Path, text: str):
    assert _load(tmp_path, text, TEMPLATES["ChatML"][0]).text == text


def test_null_keys_that_arrow_adds_to_tools_are_removed(tmp_path: Path):
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {key: {"type": "string"}}}}}
        for name, key in (("f", "city"), ("g", "day"))
    ]
    rows = [{"prompt": USER, "tools": [tool]} for tool in tools]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "prompts.parquet")
    tokenizer = make_tokenizer(80)
    tokenizer.chat_template = "{{ tools | tojson }}{{ messages[0].content }}"
    loaded = load_prompts(PromptsConfig(source=str(tmp_path / "prompts.parquet")), tokenizer)
    assert [row.text for row in loaded] == [f"{json.dumps([tool])}What is 1+1?" for tool in tools]


def test_a_long_message_is_shortened_in_an_error(tmp_path: Path):
    image = {"type": "image_url", "image_url": {"url": "x" * 100_000}}
    with pytest.raises(UserError, match="image_url") as error:
        _load(tmp_path, [{"role": "user", "content": [image]}], TEMPLATES["ChatML"][0])
    assert len(str(error.value)) < 1000
