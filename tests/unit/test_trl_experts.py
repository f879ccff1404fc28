"""A TRL script cannot send the weights of a mixture of experts whose experts transformers has joined."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tandem_protocol.config import ConfigError
from tandem_trainer.trl.needs import announce

TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def check(model: Any) -> None:
    announce(SimpleNamespace(model=model), is_rehearsal=False)


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_SCRIPT_NEEDS", raising=False)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        ),
        lambda: MixtralForCausalLM(MixtralConfig(**TINY, **EXPERTS)),
    ],
    ids=["qwen3_moe", "mixtral"],
)
def test_joined_experts_are_refused_at_the_start(model: Any) -> None:
    with pytest.raises(ConfigError, match="a mixture of experts, expected another model"):
        check(model())


@pytest.mark.parametrize(
    "model",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
        lambda: GptOssForCausalLM(GptOssConfig(**TINY, **EXPERTS)),
    ],
    ids=["llama", "gpt_oss"],
)
def test_models_with_the_parameters_of_their_checkpoints_are_accepted(model: Any) -> None:
    check(model())
