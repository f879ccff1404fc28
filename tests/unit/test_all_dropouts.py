"""Every causal language model of transformers that can be made small has no dropout once it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from tandem_protocol.config import SharedConfig
from tandem_trainer.learner.model import load_model

IDS = torch.arange(4, 16)[None]
WITHOUT_DROPOUT = """
    blt ernie4_5 ernie4_5_moe falcon_mamba gemma4_assistant gemma4_unified_assistant
    lfm2 lfm2_moe mamba mamba2 rwkv xlstm
"""
NOT_SMALL = """
    axk1 axk2 codegen cohere_compass_text cpmant dbrx deepseek_v2 deepseek_v3 deepseek_v32 diffllama dots1 emu3 gemma3n
    gemma3n_text git glm4_moe_lite glm_moe_dsa gpt_neo hunyuan_v1_dense hunyuan_v1_moe kimi_linear longcat_flash
    ministral mllama musicgen musicgen_melody nemotron nemotron_h phi4_multimodal reformer roc_bert xmod youtu zamba
    zamba2
"""
"""Architectures whose sizes depend on each other, or whose other parts have separate sizes."""
RANDOM_BY_DESIGN = {"phimoe"}
"""The router samples experts in training mode, and no setting turns that off."""
SIZES = {
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_attention_heads n_head "
    "n_heads num_heads decoder_attention_heads encoder_attention_heads num_local_experts num_experts n_routed_experts "
    "linear_num_value_heads n_mamba_heads mamba_expand eos_token_id",
    1: "encoder_layers num_encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok n_shared_experts "
    "n_group topk_group top_k mamba_n_groups linear_num_key_heads bos_token_id",
    0: "pad_token_id",
    4: "state_size laurel_rank mamba_n_heads mamba_num_heads",
    8: "rotary_dim qk_rope_head_dim qk_nope_head_dim mamba_d_state hidden_size_per_layer_input",
    16: "d_kv d_head v_head_dim q_lora_rank kv_lora_rank qk_head_dim mamba_d_head mamba_head_dim "
    "linear_key_head_dim linear_value_head_dim head_dim",
    32: "hidden_size n_embd d_model dim emb_dim embed_dim word_embed_proj_dim embedding_size moe_intermediate_size "
    "shared_expert_intermediate_size shared_intermediate_size lru_width",
    64: "vocab_size vocab_size_per_layer_input intermediate_size ffn_dim ffn_hidden_size n_inner d_ff decoder_ffn_dim "
    "encoder_ffn_dim dff d_inner inner_dim mamba_d_ssm max_position_embeddings n_positions n_ctx max_seq_len",
}


def _settings(config: PreTrainedConfig, names: str) -> list[str]:
    return [name for name in names.split() if type(vars(config).get(name)) is int]


def _dropouts(config: PreTrainedConfig) -> list[str]:
    return [name for name, value in vars(config).items() if "drop" in name and type(value) in (int, float)]


def _tiny(name: str) -> PreTrainedConfig:
    """An architecture's configuration with small sizes, and dropout wherever it has such a setting."""
    config = AutoConfig.for_model(name).get_text_config()
    dropouts = dict.fromkeys(_dropouts(config), 0.5)
    sizes = {key: size for size, names in SIZES.items() for key in _settings(config, names)}
    tiny: PreTrainedConfig = type(config)(**(sizes | dropouts))
    return tiny


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.fixture
def quiet() -> Any:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {*WITHOUT_DROPOUT.split(), *NOT_SMALL.split()})
)
def test_loaded_model_of_every_architecture_has_no_dropout(name: str, tmp_path: Path):
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(_tiny(name)).eval()
    expected = _logits(original)
    original.save_pretrained(tmp_path)
    model = load_model(tmp_path, SharedConfig(model=str(tmp_path)))
    assert _dropouts(model.config), "otherwise the test proves nothing"
    assert not any(vars(model.config)[key] for key in _dropouts(model.config))
    assert torch.equal(_logits(model), _logits(model))
    torch.testing.assert_close(_logits(model), expected, atol=1e-5, rtol=1e-4)
    if name not in RANDOM_BY_DESIGN:
        torch.testing.assert_close(_logits(model.train()), expected, atol=1e-5, rtol=1e-4)
