"""Every message about a prompt names its row, and prompts are drawn in an order that a resumed run continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from support.models import make_tokenizer
from tandem_protocol.config.rollout import PromptsConfig
from tandem_rollout.errors import UserError
from tandem_rollout.prompts import PromptCursor, check_lengths, load_prompts

TOKENIZER = make_tokenizer(80)


def _file(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_a_string_is_tokenized_and_the_other_columns_are_kept(tmp_path: Path):
    (row,) = load_prompts(PromptsConfig(source=_file(tmp_path, {"prompt": "1+2=", "answer": 3})), TOKENIZER)
    assert TOKENIZER.decode(row.token_ids) == row.text == row.prompt == "1+2="
    assert row.columns == {"answer": 3}


def test_conversation_is_rendered_with_the_generation_prompt(tmp_path: Path):
    conversation = [{"role": "user", "content": "hi"}]
    (row,) = load_prompts(PromptsConfig(source=_file(tmp_path, {"prompt": conversation})), TOKENIZER)
    assert row.text == "u:hi|a:"
    assert TOKENIZER.decode(row.token_ids) == "u:hi|a:"
    assert row.prompt == conversation


@pytest.mark.parametrize("source", ["train.parquet", "train.csv", ""], ids=["parquet", "csv", "a folder"])
def test_a_datasets_source_gives_the_same_rows(tmp_path: Path, source: str):
    rows = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    rows.to_csv(tmp_path / source) if source.endswith("csv") else rows.to_parquet(tmp_path / "train.parquet")
    got = load_prompts(PromptsConfig(source=str(tmp_path / source)), TOKENIZER)
    assert [row.prompt for row in got] == ["a", "b"]


def test_a_damaged_parquet_file_is_named(tmp_path: Path):
    (tmp_path / "train.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"train\.parquet' cannot be loaded"):
        load_prompts(PromptsConfig(source=str(tmp_path / "train.parquet")), TOKENIZER)


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("column", [[_tool("add")], json.dumps([_tool("add")])], ids=["list", "JSON text"])
def test_template_gets_the_tools_of_the_row_or_else_of_the_configuration(tmp_path: Path, column: Any):
    turns = [{"role": "user", "content": "hi"}]
    source = _file(tmp_path, {"prompt": turns, "tools": column}, {"prompt": turns, "tools": None})
    rows = load_prompts(PromptsConfig(source=source, tools=(_tool("sub"),)), TOKENIZER)
    assert [row.text for row in rows] == ["t:add|u:hi|a:", "t:sub|u:hi|a:"]
    assert rows[0].columns == {"tools": column}


@pytest.mark.parametrize("column", ["add", 7, ["add"]])
def test_invalid_tools_are_named_with_their_row(tmp_path: Path, column: Any):
    source = _file(tmp_path, {"prompt": [{"role": "user", "content": "hi"}], "tools": column})
    with pytest.raises(UserError, match=r"row 0: the column 'tools'"):
        load_prompts(PromptsConfig(source=source), TOKENIZER)


def test_tools_of_the_configuration_require_conversations(tmp_path: Path):
    source = _file(tmp_path, {"prompt": "hi"})
    with pytest.raises(UserError, match="row 0: the prompt is plain text, expected a conversation"):
        load_prompts(PromptsConfig(source=source, tools=(_tool("add"),)), TOKENIZER)


def test_message_may_have_a_tool_call_instead_of_content(tmp_path: Path):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    source = _file(tmp_path, {"prompt": [{"role": "user", "content": "hi"}, call, {"role": "tool", "content": "3"}]})
    (row,) = load_prompts(PromptsConfig(source=source), TOKENIZER)
    assert row.text == "u:hi|a:|t:3|a:"


def test_a_conversation_that_the_template_refuses_is_named_with_its_row(tmp_path: Path):
    tokenizer = make_tokenizer(80)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    source = _file(tmp_path, {"prompt": [{"role": "user", "content": "hi"}]})
    with pytest.raises(UserError, match="row 0: the model's chat template refuses the prompt: roles must alternate"):
        load_prompts(PromptsConfig(source=source), tokenizer)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["no rows"]),
        ([{"prompt": "a"}, {"question": "b"}], ["row 1", "question", "'prompt'"]),
        ([{"prompt": "a"}, {"prompt": ""}], ["row 1", "no tokens"]),
        ([{"prompt": [{"role": "user"}]}], ["row 0", "role/content"]),
        ([{"prompt": 7}], ["row 0", "7"]),
        ([["prompt"]], ["line 1", "list"]),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[Any], words: list[str]):
    with pytest.raises(UserError) as error:
        load_prompts(PromptsConfig(source=_file(tmp_path, *rows)), TOKENIZER)
    assert all(word in str(error.value) for word in words)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        load_prompts(PromptsConfig(source="nowhere.jsonl"), TOKENIZER)


def test_too_long_prompts_are_refused_with_the_row(tmp_path: Path):
    rows = load_prompts(PromptsConfig(source=_file(tmp_path, {"prompt": "ab"}, {"prompt": "abcdef"})), TOKENIZER)
    check_lengths(rows, 10, 4)
    with pytest.raises(UserError, match=r"row 1: the prompt has 6 tokens.*at most 5"):
        check_lengths(rows, 10, 5)


def test_an_epoch_draws_every_row_once_and_the_next_in_another_order():
    cursor = PromptCursor(10, seed=0, shuffle=True)
    first, second = [d.row for d in cursor.draw(10)], [d.row for d in cursor.draw(10)]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second != list(range(10))


def test_draws_depend_only_on_the_position():
    cursor, resumed = (PromptCursor(7, seed=3, shuffle=True) for _ in range(2))
    cursor.draw(5)
    resumed.position = cursor.position
    assert resumed.draw(9) == cursor.draw(9)


def test_seeds_differ_and_depend_on_the_run_seed():
    draws = PromptCursor(3, seed=1, shuffle=False).draw(50)
    assert len({draw.seed for draw in draws}) == 50
    assert draws[0].seed != PromptCursor(3, seed=2, shuffle=False).draw(1)[0].seed


def test_ranks_split_an_epoch():
    cursors = [PromptCursor(6, seed=0, shuffle=True, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(draw.row for cursor in cursors for draw in cursor.draw(3)) == list(range(6))


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_column_with_the_name_of_a_reward_argument_is_refused(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=rf"row 0 has the columns \['{name}'\].*rename"):
        load_prompts(PromptsConfig(source=_file(tmp_path, {"prompt": "a", name: "gold"})), TOKENIZER)


def test_line_separator_inside_a_string_does_not_end_the_row(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", "note": "x\u2028y\u0085z"}, ensure_ascii=False) + "\n")
    (row,) = load_prompts(PromptsConfig(source=str(path)), TOKENIZER)
    assert row.columns == {"note": "x\u2028y\u0085z"}
