"""Models with the shapes of Qwen2.5 and random weights, so that nothing has to be downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from support.models import make_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False},
}  # fmt: skip
"""Source: config.json of Qwen2.5-0.5B, 1.5B and 7B."""


def config_of(shape: str, **changes: Any) -> Qwen2Config:
    common = {"max_position_embeddings": 32_768, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Qwen2Config(**common | SHAPES[shape] | changes)


def make_model(shape: str, device: torch.device, **changes: Any) -> Qwen2ForCausalLM:
    """Return a float32 model whose random weights are made on `device`."""
    with device:
        return Qwen2ForCausalLM(config_of(shape, **changes)).eval()


def write_model(shape: str, folder: Path, device: torch.device, **changes: Any) -> Path:
    """Write the model in bfloat16, and a tokenizer of a few words, into `folder`."""
    torch.manual_seed(0)
    make_model(shape, device, **changes).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_config(shape: str, folder: Path) -> Path:
    """Write the model's config.json and tokenizer without its weights, which the mock generator does not need."""
    config_of(shape, architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
