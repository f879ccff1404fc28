"""A model that is loaded for training is deterministic, and computes the same as in evaluation mode."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Starcoder2Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from tandem_protocol.config import SharedConfig
from tandem_rollout.errors import UserError
from tandem_trainer.learner.logprobs import TokenLogprobs, check_logprobs
from tandem_trainer.learner.model import checkpoint_gradients, load_model

IDS = torch.arange(4, 16)[None]
COMMON = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, **COMMON}
RANDOM: dict[str, PreTrainedConfig] = {
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5, layerdrop=0.5, **COMMON
    ),
    "starcoder2": Starcoder2Config(residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5, **LLAMA),
    "gpt_bigcode": GPTBigCodeConfig(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, hidden_dropout=0.5, attention_dropout=0.5),
    "falcon": FalconConfig(hidden_size=32, hidden_dropout=0.5, attention_dropout=0.5, **COMMON),
    "llama": LlamaConfig(attention_dropout=0.5, **LLAMA),
    "mixtral": MixtralConfig(
        attention_dropout=0.5, router_jitter_noise=0.5, num_local_experts=2, num_key_value_heads=1, **LLAMA
    ),
}


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", RANDOM)
def test_loaded_model_is_deterministic_and_equals_evaluation_mode(name: str, tmp_path: Path):
    model = AutoModelForCausalLM.from_config(RANDOM[name])
    assert not torch.equal(_logits(model.train()), _logits(model.train())), "otherwise the test proves nothing"
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, SharedConfig(model=str(tmp_path)))
    assert torch.equal(_logits(loaded), _logits(loaded))
    torch.testing.assert_close(_logits(loaded), _logits(model.eval()))
    if name != "mixtral":  # its routers add noise only in training mode
        torch.testing.assert_close(_logits(loaded.train()), _logits(model))
    bare = load_model(tmp_path, SharedConfig(model=str(tmp_path)), without_weights=True)
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert [type(module) for module in bare.modules()] == [type(module) for module in loaded.modules()]


@pytest.mark.parametrize("name", ["opt", "mixtral", "llama"])
def test_gradient_checkpointing_computes_layers_again_with_the_same_result(name: str, tmp_path: Path):
    AutoModelForCausalLM.from_config(RANDOM[name]).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, SharedConfig(model=str(tmp_path)))
    expected, runs = _logits(loaded), []
    checkpoint_gradients(loaded)
    layer = next(module for module in loaded.modules() if isinstance(module, GradientCheckpointingLayer))
    next(layer.children()).register_forward_pre_hook(lambda *_: runs.append(1))
    logits = loaded(input_ids=IDS, use_cache=False).logits
    assert len(runs) == 1
    logits.sum().backward()
    assert len(runs) == 2
    torch.testing.assert_close(logits, expected)


def test_dropout_that_is_not_in_the_configuration_is_removed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    init = LlamaForCausalLM.__init__

    def with_dropout(self: Any, config: Any) -> None:
        init(self, config)
        self.model.extra = nn.AlphaDropout(0.5)
        self.model.drop_rate, self.model.drop_path, self.model.drop_last = 0.5, None, True

    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_dropout)
    model = load_model(tmp_path, SharedConfig(model=str(tmp_path)))
    assert model.model.extra.p == model.model.drop_rate == 0.0
    assert (model.model.drop_path, model.model.drop_last) == (None, True)


class Noisy(nn.Module):
    """Noise that no setting controls."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.rand_like(hidden)


def test_random_model_is_refused_with_the_name_of_the_random_module():
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).train()
    check_logprobs(TokenLogprobs(model, temperature=1.0, chunk_size=4))
    model.model.layers[1].mlp.act_fn = Noisy()
    with pytest.raises(UserError, match=re.escape("begins in model.layers.1.mlp.act_fn (Noisy)")):
        check_logprobs(TokenLogprobs(model, temperature=1.0, chunk_size=4))


def test_randomness_is_reported_before_unknown_changes_of_the_logits():
    model = LlamaForCausalLM(LlamaConfig(attention_dropout=0.5, **LLAMA)).train()
    with pytest.raises(UserError, match="LlamaForCausalLM is random") as error:
        check_logprobs(TokenLogprobs(model, temperature=1.0, chunk_size=4))
    assert "soft-capping" not in str(error.value)
    assert "self_attn (LlamaAttention)" in str(error.value)
