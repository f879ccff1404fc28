"""When a run resumes, every changed setting takes effect or is refused with the reason."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from support.project_code import write_module
from tandem_protocol.config.alerts import AlertsConfig
from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.config.trainer import TrainerSettings
from tandem_rollout.errors import UserError
from tandem_rollout.prompts import PromptRow
from tandem_trainer.run.resume import CODE, EVALUATION, FIXED, PROCESSES, SAMPLING, SCORING, Changes, compare, describe

ROWS = [PromptRow(i, f"row {i}", "1+2=", "1+2=", (4, i), {"answer": str(i)}) for i in range(3)]
BASE: dict[str, Any] = {
    "shared": {"model": "m"},
    "trainer": {
        "max_steps": 100,
        "rewards": [{"function": "rewards:r"}],
        "eval": {"prompts": {"source": "held_out.jsonl"}, "every_steps": 10, "temperature": 0.5},
        "lora": {"r": 8},
    },
}
OTHER_PROMPTS: dict[str, Any] = {
    "source": "other.jsonl", "subset": "main", "split": "test", "column": "question", "shuffle": False, "limit": 2,
    "chat_template_kwargs": {"enable_thinking": False}, "tools": [{"function": {"name": "f"}}],
}  # fmt: skip
OTHER: dict[str, Any] = {
    "shared": {
        "model": "other", "revision": "abc", "trust_remote_code": True, "weights_dir": "elsewhere",
        "generators": ["http://127.0.0.1:9000"],
    },
    "trainer": {
        "output_dir": "elsewhere", "run_name": "other", "seed": 1, "max_steps": 200, "max_lag": 0,
        "algorithm": "online_dpo", "algorithm_arguments": {"n": 2}, "prompts": OTHER_PROMPTS,
        "rewards": [{"function": "rewards:other", "weight": 2.0}],
        "reward_errors": "drop", "reward_timeout_s": 1.0,
        "rollout": {
            "num_prompts": 4, "num_generations": 2, "max_completion_length": 8, "temperature": 0.7, "top_p": 0.9,
            "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [3], "timeout_s": 1.0,
            "stall_timeout_s": 1.0, "tools": ["tools:f"], "environment": {"one": "games:One"}, "agent": "agents:run",
            "max_turns": 2, "max_turn_length": 4, "tool_timeout_s": 1.0, "max_tool_characters": 10,
            "tool_parser": "hermes", "history": "template", "episode_timeout_s": 1.0, "refill": True,
            "environment_urls": ["http://environment:8100"],
            "environment_server": {
                "host": "0.0.0.0", "port": 8101, "max_sessions": 2, "idle_timeout_s": 1.0, "shutdown_timeout_s": 1,
            },
        },
        "grpo": {
            "loss_type": "grpo", "level": "sequence", "beta": 0.1, "bias_correction_kl": False, "epsilon": 0.1,
            "epsilon_high": 0.3, "delta": 2.0, "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 2.0,
            "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0, "vespo_k_neg": 1.0, "vespo_lambda_neg": 1.0,
            "top_entropy_quantile": 0.5, "off_policy_mask": 1.0, "importance_sampling": "none", "clip_max": 2.0,
            "clip_min": 0.5, "scale_rewards": "batch", "multi_objective_aggregation": "normalize_then_sum",
            "mask_truncated_completions": True, "num_iterations": 2, "loss_arguments": {"low": 0.2},
            "reduction": "trajectory_mean", "advantage": "losses:a", "advantage_arguments": {"k": 2},
        },
        "online_dpo": {
            "judge": "judges:j", "loss_type": "ipo", "beta": 0.2, "missing_eos_penalty": 1.0,
            "loss_arguments": {"m": 1.0},
        },
        "optim": {
            "name": "adamw_8bit", "learning_rate": 1.0, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9,
            "adam_epsilon": 1e-6, "max_grad_norm": 2.0, "lr_scheduler_type": "linear", "warmup_steps": 5,
        },
        "learner": {
            "dtype": "bfloat16", "parallelism": "fsdp2", "max_tokens_per_micro_batch": 64, "logprob_chunk_size": 8,
            "gradient_checkpointing": True, "compile": True, "shared_prompts": "never",
        },
        "lora": {"r": 4, "alpha": 1.0, "target_modules": ["q_proj"]},
        "checkpoint": {"every_steps": 1, "keep": 5, "keep_best": True},
        "publish": {"mode": "drain", "delta": "always", "keep": 5, "timeout_s": 1.0},
        "eval": {
            "prompts": OTHER_PROMPTS, "every_steps": 5, "temperature": 1.0, "num_generations": 4, "pass_at": [1],
        },
        "alerts": {
            name: limit + 1 if isinstance(limit, int) else limit / 2
            for name, limit in AlertsConfig().model_dump().items()
        },
        "trackers": ["tensorboard"], "max_mismatch": 1.0, "log_completions": 0, "log_tokens": 0, "metrics_port": 9100,
        "start_timeout_s": 1.0,
    },
}  # fmt: skip
"""A different value for every setting."""
TOGETHER: dict[str, dict[str, Any]] = {
    "trainer.algorithm_arguments": {"algorithm": "losses:Mine"},
    "trainer.grpo.loss_arguments": {"grpo": {"loss_type": "losses:mine"}},
    "trainer.grpo.advantage_arguments": {"grpo": {"advantage": "losses:a"}},
    "trainer.online_dpo.loss_arguments": {"online_dpo": {"loss_type": "losses:pairs"}},
    "trainer.algorithm": {"rollout": {"num_generations": 2}},
    "trainer.online_dpo.judge": {"algorithm": "online_dpo", "rollout": {"num_generations": 2}, "rewards": []},
}
"""Key → other settings that its different value requires."""


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting. A list of models is one setting."""
    for name, field in model.model_fields.items():
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if inner and "tuple" not in str(field.annotation):
            yield from _leaves(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _merged(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
            for k, v in other.items()}  # fmt: skip
    return base | both


def _with(key: str) -> dict[str, Any]:
    """Return the base configuration with a different value for `key`."""
    value: Any = OTHER
    for part in key.split("."):
        assert part in value, (
            f"add a different value of {key} to OTHER, and decide in resume.py what a change of it does"
        )
        value = value[part]
    change: Any = value
    for part in reversed(key.split(".")):
        change = {part: change}
    return _merged(_merged(BASE, {"trainer": TOGETHER.get(key, {})}), change)


def _described(tree: dict[str, Any], rows: list[PromptRow] = ROWS, eval_rows: list[PromptRow] = ROWS) -> dict[str, Any]:
    settings = TrainerSettings.model_validate(tree)
    facts = describe(settings, processes=1, fingerprint={"config": "a"}, rows=rows, eval_rows=eval_rows)
    return json.loads(json.dumps(facts))  # as read from a checkpoint


@pytest.mark.parametrize("key", [*_leaves(TrainerSettings)])
def test_a_changed_setting_is_reported_or_refused_with_the_reason(key: str, tmp_path: Path):
    before, now = _described(BASE), _described(_with(key))
    fixed = [reason for name, reason in FIXED.items() if key == name or key.startswith(f"{name}.")]
    if fixed:
        with pytest.raises(UserError) as refused:
            compare(before, now, tmp_path)
        assert str(refused.value).startswith(f"{key}: ")
        assert f"but {fixed[0]}" in str(refused.value)
        assert "trainer.run_name" in str(refused.value)
        return
    changes = {change.key: change for change in compare(before, now, tmp_path)}
    found = changes[key] if key in changes else next(c for name, c in changes.items() if name.startswith(f"{key}."))
    assert found.before != found.now
    if key not in TOGETHER:
        assert all(name == key or name.startswith(f"{key}.") for name in changes)


@pytest.mark.parametrize(("before", "now"), [({"lora": None}, {}), ({}, {"lora": None})], ids=["added", "removed"])
def test_adding_or_removing_the_adapter_is_refused(before: dict[str, Any], now: dict[str, Any], tmp_path: Path):
    with pytest.raises(UserError, match=r"not set.*holds the parameters of this adapter"):
        compare(_described(_merged(BASE, {"trainer": before})), _described(_merged(BASE, {"trainer": now})), tmp_path)


def _changes(tmp_path: Path, tree: dict[str, Any] = BASE, **rows: list[PromptRow]) -> Changes:
    return compare(_described(BASE), _described(tree, **rows), tmp_path)


def test_an_unchanged_run_has_no_changes(tmp_path: Path):
    assert _changes(tmp_path) == ()


def test_another_number_of_prompts_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="the number of prompts: 3 → 2, but the order of the prompts follows"):
        _changes(tmp_path, rows=ROWS[:2])


def test_another_number_of_processes_is_refused_with_the_way_back(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"processes: 2 → 1, but each.* continue that run \(TANDEM_TRAINER_PROCESSES=2[,)]"
    ):
        compare(_described(BASE) | {PROCESSES: 2}, _described(BASE), tmp_path)


def test_edited_answers_change_rewards_and_edited_held_out_prompts_change_evaluations(tmp_path: Path):
    edited = [*ROWS[:2], PromptRow(2, "row 2", "1+2=", "1+2=", (4, 2), {"answer": "other"})]
    training, held_out = _changes(tmp_path, rows=edited), _changes(tmp_path, eval_rows=edited)
    assert [str(change) for change in training] == ["the prompts and their columns changed"]
    assert (training.touch(SCORING), training.touch(SAMPLING), training.touch(EVALUATION)) == (True, False, False)
    assert (held_out.touch(SCORING), held_out.touch(EVALUATION)) == (False, True)


def test_an_edited_prompt_with_the_same_tokens_changes_rewards(tmp_path: Path):
    """A chat template may trim a message. The tokens then stay the same, but the rewards see the edit."""
    edited = [*ROWS[:2], PromptRow(2, "row 2", "1+2= ", "1+2=", (4, 2), {"answer": "2"})]
    assert _changes(tmp_path, rows=edited).touch(SCORING)


def test_every_rollout_setting_except_numbers_of_prompts_timeouts_and_places_changes_what_is_sampled():
    others = {
        "environment_urls",
        "environment_server",
        "num_prompts",
        "refill",
        "timeout_s",
        "stall_timeout_s",
        "tool_timeout_s",
        "episode_timeout_s",
    }
    assert set(SAMPLING) == {f"trainer.rollout.{name}" for name in RolloutConfig.model_fields.keys() - others}


@pytest.mark.parametrize("key", ["trainer.rewards", "trainer.online_dpo.judge"])
def test_other_functions_change_rewards_and_evaluations(key: str, tmp_path: Path):
    changes = _changes(tmp_path, _with(key))
    only = Changes(change for change in changes if change.key == key)
    assert (only.touch(SCORING), only.touch(EVALUATION)) == (True, True)


def test_an_edited_reward_of_an_installed_package_changes_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "installed_rewards.py").write_text("def r(**_): return [1.0]\n")
    __import__("installed_rewards")
    tree = _merged(BASE, {"trainer": {"rewards": [{"function": "installed_rewards:r"}]}})
    before = _described(tree)
    (tmp_path / "installed_rewards.py").write_text("def r(**_): return [2.0]\n")
    assert compare(before, _described(tree), tmp_path).touch(SCORING)


def test_edited_code_of_the_project_changes_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "helper_of_rewards.py").write_text("LIMIT = 1\n")
    __import__("helper_of_rewards")
    before = _described(BASE)
    assert compare(before, _described(BASE), tmp_path) == ()
    (tmp_path / "helper_of_rewards.py").write_text("LIMIT = 2\n")
    changes = compare(before, _described(BASE), tmp_path)
    assert [change.key for change in changes] == ["the project's code"]
    assert changes.touch(SCORING)


def test_a_long_value_is_shortened_in_the_message(tmp_path: Path):
    rewards = [{"function": "rewards:r", "arguments": {"words": ["word"] * 100}}]
    (change,) = _changes(tmp_path, _merged(BASE, {"trainer": {"rewards": rewards}}))
    assert 200 < len(str(change)) < 500


def test_changed_code_of_a_loss_outside_the_project_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = write_module(tmp_path, monkeypatch, "def loss(logprobs_BT): return logprobs_BT")
    importlib.import_module(name)
    settings = _merged(BASE, {"trainer": {"grpo": {"loss_type": f"{name}:loss"}}})
    before = _described(settings)
    (tmp_path / f"{name}.py").write_text("def loss(logprobs_BT): return -logprobs_BT")
    assert [change.key for change in compare(before, _described(settings), tmp_path)] == [CODE]
