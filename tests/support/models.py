"""A Llama small enough to train in a test, with a tokenizer of single characters."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
CHARACTERS = list("0123456789+-=abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:?!|")
CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}t:{{ tool.function.name }}|{% endfor %}"
    "{% for turn in messages %}{{ turn.role[0] }}:{{ turn.content }}|{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def make_tiny_model(
    directory: Path,
    *,
    vocab: int = 64,
    tied: bool = True,
    seed: int = 0,
    initializer_range: float = 0.02,
    max_position_embeddings: int = 128,
) -> Path:
    """Write a Llama with about 30,000 random parameters and its tokenizer into `directory`.

    With a larger `initializer_range` the distributions are so peaked that no two tokens have the same probability.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM's CPU attention supports
        initializer_range=initializer_range,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    make_tokenizer(vocab).save_pretrained(directory)
    return directory


def make_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character. The first three tokens are special."""
    words = [*SPECIAL, *CHARACTERS][:vocab]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )
