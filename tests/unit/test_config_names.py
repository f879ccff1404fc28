"""A setting that takes a known name or `module:name` refuses everything else with the nearest known name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem_protocol.config import ConfigError, load
from tandem_protocol.config.trainer import TrainerConfig, TrainerSettings

BASE: dict[str, Any] = {"shared": {"model": "m"}, "trainer": {"max_steps": 1, "rewards": [{"function": "r:r"}]}}
KEYS = ["trainer.algorithm", "trainer.grpo.loss_type", "trainer.online_dpo.loss_type"]


def _load(tmp_path: Path, **overrides: Any) -> TrainerConfig:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(BASE))
    return load(TrainerSettings, path=tmp_path / "config.yaml", env={}, overrides=overrides)[0].trainer


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["losses:mine", "package.losses:Mine"])
def test_a_name_of_the_project_is_accepted(tmp_path: Path, key: str, name: str) -> None:
    config = _load(tmp_path, **{key: name})
    assert name in config.functions


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.algorithm", "gpro", "expected grpo, online_dpo, or module:name of the project. Did you mean grpo?"),
        ("trainer.algorithm", "onlinedpo", "Did you mean online_dpo?"),
        ("trainer.grpo.loss_type", "dapoo", "got 'dapoo', expected grpo, bnpo, "),
        ("trainer.grpo.loss_type", "DAPO", "Did you mean dapo?"),
        ("trainer.grpo.loss_type", "dr-grpo", "Did you mean dr_grpo?"),
        ("trainer.grpo.loss_type", "losses.mine", "or module:name of the project. Fix: correct the name."),
        ("trainer.grpo.loss_type", "losses:", "or module:name of the project."),
        ("trainer.grpo.loss_type", "losses:a:b", "or module:name of the project."),
        ("trainer.online_dpo.loss_type", "sigmoidal", "Did you mean sigmoid?"),
    ],
)
def test_a_typo_is_refused_with_the_nearest_name(tmp_path: Path, key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _load(tmp_path, **{key: value})
    assert str(refused.value).startswith(f"{key} (from command line): got '{value}', expected ")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"trainer.grpo.loss_arguments": "{a: 1}"},
            "loss_arguments is set for loss_type dapo, expected module:function",
        ),
        ({"trainer.online_dpo.loss_arguments": "{a: 1}"}, "loss_arguments is set for loss_type sigmoid"),
        ({"trainer.grpo.advantage_arguments": "{a: 1}"}, "advantage_arguments is set, but advantage is null"),
        ({"trainer.algorithm_arguments": "{a: 1}"}, "algorithm_arguments is set for algorithm grpo"),
        ({"trainer.rollout.num_generations": "1"}, "num_generations is 1, expected 2 or more"),
        ({"trainer.algorithm": "m:A", "trainer.rewards": "[]"}, "rewards is empty"),
    ],
)
def test_settings_that_need_a_function_of_the_project_are_refused_without_one(
    tmp_path: Path, overrides: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, **overrides)


def test_arguments_are_given_key_by_key(tmp_path: Path) -> None:
    keys = {"trainer.grpo.loss_type": "losses:mine", "trainer.grpo.loss_arguments.weight": "0.5"}
    assert _load(tmp_path, **keys).grpo.loss_arguments == {"weight": 0.5}
