"""docs/integrate/trl.md lists every default that differs from TRL's, and the counterpart of each option of TRL."""

from __future__ import annotations

import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from tandem_protocol.config.generator import GeneratorConfig
from tandem_protocol.config.trainer import TrainerConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/integrate/trl.md").read_text()
TRL = json.loads((ROOT / "tests" / "golden" / "trl-1.16-defaults.json").read_text())

SHARED = {
    **{name: f"optim.{name}" for name in (
        "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
        "lr_scheduler_type", "warmup_steps",
    )},
    **{name: f"rollout.{name}" for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    "bf16": "learner.dtype",
    "gradient_checkpointing": "learner.gradient_checkpointing",
    "report_to": "trackers",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "seed": "seed",
    "vllm_server_host": "generator.host",
    "vllm_server_port": "generator.port",
    "vllm_server_timeout": "start_timeout_s",
    "vllm_gpu_memory_utilization": "generator.gpu_memory_utilization",
    "vllm_tensor_parallel_size": "generator.tensor_parallel_size",
}  # fmt: skip
"""TRL's name → ours, relative to `trainer` unless it starts with `generator.`."""
COUNTERPARTS = {
    "GRPOConfig": SHARED
    | {name: f"rollout.{name}" for name in ("num_generations", "max_completion_length")}
    | {name: f"grpo.{name}" for name in (
        "beta", "num_iterations", "epsilon", "epsilon_high", "delta", "sapo_temperature_neg", "sapo_temperature_pos",
        "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "multi_objective_aggregation",
        "scale_rewards", "loss_type", "mask_truncated_completions", "top_entropy_quantile",
    )}
    | {
        "importance_sampling_level": "grpo.level",
        "vllm_importance_sampling_mode": "grpo.importance_sampling",
        "vllm_importance_sampling_clip_max": "grpo.clip_max",
        "vllm_importance_sampling_clip_min": "grpo.clip_min",
        "off_policy_mask_threshold": "grpo.off_policy_mask",
        "use_bias_correction_kl": "grpo.bias_correction_kl",
        "shuffle_dataset": "prompts.shuffle",
        "chat_template_kwargs": "prompts.chat_template_kwargs",
        "log_completions": "log_completions",
        "vllm_max_model_length": "generator.max_model_len",
    },
    "OnlineDPOConfig": SHARED
    | {
        "max_new_tokens": "rollout.max_completion_length",
        "beta": "online_dpo.beta",
        "loss_type": "online_dpo.loss_type",
        "missing_eos_penalty": "online_dpo.missing_eos_penalty",
    },
}  # fmt: skip
SAME_ON_ALL_SIDES = {"trust_remote_code"}
"""Options in `shared`, which have the same name and default as in TRL."""


def _our_default(key: str) -> Any:
    section, path = (GeneratorConfig, key[10:]) if key.startswith("generator.") else (TrainerConfig, key)
    *parents, leaf = path.split(".")
    field = reduce(lambda model, name: type(model.model_fields[name].default), parents, section).model_fields[leaf]
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _shown(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _differing(config: str) -> set[tuple[str, ...]]:
    """The options whose defaults differ: TRL's name, its default, our name, our default."""
    rows = [(name, TRL[config][name], key, _our_default(key)) for name, key in COUNTERPARTS[config].items()]
    return {(f"`{name}`", _shown(trl), f"`{key}`", _shown(ours)) for name, trl, key, ours in rows if trl != ours}


def _tables() -> list[set[tuple[str, ...]]]:
    tables = re.findall(r"\| TRL \| its default .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE)
    return [{tuple(cell.strip() for cell in row.split("|")[1:5]) for row in table.splitlines()} for table in tables]


def test_page_lists_exactly_the_defaults_that_differ():
    grpo, online_dpo = _tables()
    assert grpo == _differing("GRPOConfig")
    assert online_dpo == _differing("OnlineDPOConfig") - grpo


@pytest.mark.parametrize("config", COUNTERPARTS)
def test_every_option_of_trl_has_a_counterpart_or_is_on_the_page(config: str):
    without_counterpart = TRL[config].keys() - COUNTERPARTS[config].keys() - SAME_ON_ALL_SIDES
    assert sorted(name for name in without_counterpart if f"`{name}`" not in PAGE) == []


def test_every_row_of_the_page_gives_a_reason():
    rows = re.findall(r"^\| `\w+` \| `.*` \| `.*` \| `.*` \|(.*)\|$", PAGE, re.MULTILINE)
    assert len(rows) == sum(map(len, _tables()))
    assert all(row.strip() for row in rows)
