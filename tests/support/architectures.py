"""A tiny model of every causal language model family that transformers knows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.models import make_tokenizer

FAMILIES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The `model_type` of every family."""
MULTIMODAL = (
    "blt", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified",
    "gemma4_unified_assistant", "git", "got_ocr2", "llama4", "minimax_m3_vl_text", "mllama", "moshi", "musicgen",
    "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "trocr", "whisper",
)  # fmt: skip
"""Multimodal families. If vLLM has their text model, it is a separate family."""
NOT_TINY = ("cohere_compass_text", "cpmant", "reformer", "rembert", "xlm", "xlnet", "xmod", "zamba")
"""Families with sizes that no configuration key changes, or with inputs besides token ids."""
TEXT_FAMILIES = tuple(family for family in FAMILIES if family not in (*MULTIMODAL, *NOT_TINY))
VOCAB, POSITIONS = 64, 512
HEAD_DIM = 32
"""The smallest head dimension that vLLM's CPU attention supports."""

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": HEAD_DIM, "max_position_embeddings": POSITIONS,
    "sliding_window": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    # GPT-2 and its relatives
    "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS, "rotary_dim": 16, "n_inner": 96,
    # OPT, MPT, XGLM, and encoder-decoder models
    "ffn_dim": 96, "word_embed_proj_dim": 64, "d_model": 64, "n_heads": 2, "n_layers": 2, "max_seq_len": POSITIONS,
    "num_layers": 2, "num_heads": 2, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 96,
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 96, "attention_heads": 2,
    "embedding_size": 64, "num_kv_heads": 1, "ffn_hidden_size": 96,
    # Mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "moe_num_experts": 4, "moe_topk": 2,
    # Multi-head latent attention
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    # State-space and linear-attention layers
    "state_size": 16, "time_step_rank": 8, "n_groups": 1, "mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32,
    "mamba_d_state": 16, "mamba_dt_rank": 8, "ssm_state_size": 16, "mamba_num_heads": 2, "mamba_head_dim": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip

_LOCAL_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"]}
_MAMBA_ATTENTION = ["linear_attention", "full_attention"]
_OWN: dict[str, dict[str, Any]] = {
    "axk2": {"index_topk": 8, "index_head_dim": 32, "index_n_heads": 2, "num_key_value_heads": 2},
    "bamba": {"mamba_n_heads": 4, "attn_layer_indices": [1]},
    "biogpt": {"max_position_embeddings": POSITIONS},
    "bloom": {"hidden_size": 64, "n_head": 2},
    "codegen": {"n_embd": 128, "n_head": 4},
    "cohere": {"logit_scale": 0.7},
    "cohere2": {"logit_scale": 0.7, "sliding_window": 64, **_LOCAL_GLOBAL},
    "cohere2_moe": {"logit_scale": 0.7, "sliding_window": 64, **_LOCAL_GLOBAL},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **_LOCAL_GLOBAL,
    },
    "cpmant": {"dim_head": 32, "dim_ff": 96, "prompt_types": 2, "prompt_length": 4, "segment_types": 4},
    "ctrl": {"dff": 96},
    "cwm": _LOCAL_GLOBAL,
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v32": {"index_topk": 8, "index_head_dim": 32, "index_n_heads": 2, "num_key_value_heads": 2},
    "diffllama": {"num_key_value_heads": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "exaone4": _LOCAL_GLOBAL,
    "falcon": {"ffn_hidden_size": 256},
    "falcon_h1": {
        "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "key_multiplier": 0.5, "attention_out_multiplier": 0.7,
        "ssm_in_multiplier": 1.5, "ssm_out_multiplier": 0.7, "mlp_multipliers": [1.5, 0.7],
        "ssm_multipliers": [0.5, 0.7, 1.5, 2.0, 1.3],
    },
    "gemma2": {"query_pre_attn_scalar": 32, "final_logit_softcapping": 5.0, **_LOCAL_GLOBAL},
    "gemma3_text": {"query_pre_attn_scalar": 32, **_LOCAL_GLOBAL},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "gemma4_text": {
        "num_experts": None, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16, **_LOCAL_GLOBAL,
    },
    "glm_moe_dsa": {"index_topk": 8, "index_head_dim": 32, "index_n_heads": 2, "num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16, "intermediate_size": 96},
    "gpt_oss": _LOCAL_GLOBAL,
    "granite": {
        "logits_scaling": 2.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 4, "mamba_d_head": 32, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
        "shared_intermediate_size": 96, "logits_scaling": 2.0,
    },
    "hyperclovax": {"logits_scaling": 2.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1},
    "kimi_linear": {
        "layer_types": _MAMBA_ATTENTION, "linear_head_dim": 32, "linear_num_heads": 2, "qk_rope_head_dim": 16,
        "q_lora_rank": None,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32, "conv_dim": 64,
             "conv_dim_out": 64, "block_dim": 64, "block_ff_dim": 96},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_attention_heads": 2, "num_key_value_heads": 2, "qk_head_dim": 32, "head_dim": 16,
                      "zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "minicpm3": {"num_key_value_heads": 2, "dim_model_base": 32, "scale_emb": 2},
    "ministral": _LOCAL_GLOBAL,
    "mixtral": {"sliding_window": None},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4, "mamba_hidden_act": "silu",
    },
    "olmo3": _LOCAL_GLOBAL,
    "olmo_hybrid": {"layer_types": _MAMBA_ATTENTION},
    "phi3": {"sliding_window": None},
    "qwen2": {"sliding_window": None},
    "qwen3": {"sliding_window": None},
    "qwen3_5_text": {"layer_types": _MAMBA_ATTENTION},
    "qwen3_next": {"layer_types": _MAMBA_ATTENTION},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": (16, 32), "axial_pos_embds_dim": (32, 32), "attention_head_size": 32,
        "feed_forward_size": 96, "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16,
        "attn_layers": ["local", "local"],
    },
    "smollm3": {"no_rope_layers": [1, 0], "sliding_window": None, "use_sliding_window": False},
    "vaultgemma": {"query_pre_attn_scalar": 32, "final_logit_softcapping": 5.0, **_LOCAL_GLOBAL},
    "zamba": {
        "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
        "n_mamba_heads": 4, "adapter_rank": 8, "num_key_value_heads": 2,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "num_key_value_heads": 2},
}  # fmt: skip
"""Family → values that add to or replace `_SMALL`. Multipliers differ from 1, so that they have an effect."""


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Return the family's configuration with the smallest possible sizes."""
    cls = CONFIG_MAPPING[family]
    known = set(cls.__dataclass_fields__)
    values = {name: value for name, value in _SMALL.items() if name in known} | _OWN.get(family, {}) | changes
    return cls(**values)


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a random model. Its distributions are neither uniform nor concentrated on a single token."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.normal_(0, 0.1)
    _flatten(model)
    return model


@torch.no_grad()
def _flatten(model: PreTrainedModel) -> None:
    """Scale the embeddings down until the mean entropy per token is half of the possible maximum."""
    embeddings: Any = {id(layer.weight): layer.weight for layer in _embeddings(model)}.values()
    token_ids_BS = torch.arange(3, VOCAB)[None]
    for weight in embeddings:
        weight.normal_(0, 1)
    for _ in range(20):
        logprobs_SV = model(input_ids=token_ids_BS, use_cache=False).logits[0].float().log_softmax(-1)
        if -(logprobs_SV.exp() * logprobs_SV).sum(-1).mean() > math.log(VOCAB) / 2:
            return
        for weight in embeddings:
            weight.mul_(0.8)


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    layers = (model.get_output_embeddings(), model.get_input_embeddings())
    return [layer for layer in layers if hasattr(layer, "weight")]


def make_architecture(directory: Path, family: str, **changes: Any) -> Path:
    """Write a tiny model of `family` and its tokenizer into `directory`."""
    tiny_model(tiny_config(family, **changes)).save_pretrained(directory)
    make_tokenizer(VOCAB).save_pretrained(directory)
    return directory
