"""A prompt begins with the special tokens of the tokenizer, exactly once, and does not end with any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from support.chat_templates import TEMPLATES, USER
from support.models import make_tokenizer
from tandem_protocol.config.rollout import PromptsConfig
from tandem_rollout.prompts import load_prompts

BOS, EOS = 1, 2
AROUND = {
    "nothing (GPT-2)": ("$A", ()),
    "BOS (Llama)": ("<s> $A", (BOS,)),
    "EOS (T5)": ("$A </s>", ()),
    "BOS and EOS": ("<s> $A </s>", (BOS,)),
    "two before, one behind (BERT, GLM)": ("<pad> <s> $A </s>", (0, BOS)),
}
"""Name → the special tokens that a tokenizer adds to a text, and those with which a prompt must begin."""


def _ids(tmp_path: Path, around: str, prompt: Any, template: str | None = None) -> tuple[int, ...]:
    tokenizer = make_tokenizer(80)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<pad>", 0), ("<s>", BOS), ("</s>", EOS)]
    )
    assert tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids or around == "$A"
    tokenizer.chat_template = template
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt}))
    (row,) = load_prompts(PromptsConfig(source=str(tmp_path / "prompts.jsonl")), tokenizer)
    return row.token_ids


def _bare(text: str) -> tuple[int, ...]:
    return tuple(make_tokenizer(80)(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("text", ["1+1=", "a", "a a", "</s>"])
def test_plain_text_gets_special_tokens_only_at_its_start(tmp_path: Path, name: str, text: str):
    around, opening = AROUND[name]
    assert _ids(tmp_path, around, text) == (*opening, *_bare(text))


@pytest.mark.parametrize("name", AROUND)
def test_text_that_starts_with_special_tokens_gets_no_more(tmp_path: Path, name: str):
    around, opening = AROUND[name]
    begun = {(): "", (BOS,): "<s>", (0, BOS): "<pad><s>"}[opening]
    assert _ids(tmp_path, around, f"{begun}1+1=") == (*opening, *_bare("1+1="))


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("template", ["Llama 3", "ChatML"])
def test_the_text_of_a_chat_template_gets_no_special_tokens(tmp_path: Path, name: str, template: str):
    around, _ = AROUND[name]
    text, expected = TEMPLATES[template]
    ids = _ids(tmp_path, around, USER, text)
    assert ids == _bare(expected.user)
    assert ids.count(BOS) == expected.user.count("<s>")
