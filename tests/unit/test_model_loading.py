"""A model that transformers cannot load, or loads with wrong weights, is refused with a message of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.models import make_tiny_model
from tandem_protocol.config import SharedConfig
from tandem_rollout.errors import UserError
from tandem_rollout.project import load_tokenizer
from tandem_trainer.learner.model import load_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(model: Path) -> None:
    shared = SharedConfig(model=str(model))
    load_tokenizer(shared)
    load_model(model, shared)


@pytest.mark.parametrize(
    ("file", "values", "problem"),
    [
        (
            "config.json",
            {"hidden_size": 64},
            r"20 weights .*model\.embed_tokens\.weight got \(64, 32\), expected \(64, 64\)",
        ),
        ("config.json", {"hidden_size": "big"}, "expected int, got str"),
        ("config.json", {"num_attention_heads": 0}, "ZeroDivisionError"),
        ("config.json", {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "Unrecognized"),
        ("config.json", {"model_type": "nosuch", "architectures": ["NoSuch"]}, "nosuch"),
        ("tokenizer.json", {"added_tokens": None}, "the tokenizer of shared.model"),
    ],
)
def test_model_that_cannot_be_loaded_is_refused_in_one_line(
    model: Path, file: str, values: dict[str, Any], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    change(model / file, **values)
    with pytest.raises(UserError, match=problem) as caught:
        load(model)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500
    assert "LOAD REPORT" not in caplog.text


def test_a_tokenizer_without_its_file_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"the tokenizer of shared\.model .* cannot be loaded"):
        load(model)
