"""A model's folder without weights, whose tokenizer writes any text, in ChatML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
END = 258
"""Token id of `<|im_end|>`."""
VOCAB = 256 + len(SPECIAL)


def chatml_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte, and a token for each special word of ChatML and of tool calls."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    return tokenizer


def make_chatml_model(directory: Path, **files: Mapping[str, Any]) -> Path:
    """Write the folder. `files` replaces the content of `config`, `tokenizer_config` or `generation_config`."""
    contents: dict[str, Mapping[str, Any]] = {
        "config": {"model_type": "llama", "vocab_size": VOCAB, "eos_token_id": 256, "max_position_embeddings": 4096},
        "tokenizer_config": {"eos_token": "<|im_end|>"},
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (contents | files).items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    chatml_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def rendered(*messages: tuple[str, str]) -> str:
    """Return a conversation of (role, content), ready for the next answer of the model."""
    turns = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return f"{turns}<|im_start|>assistant\n"


def tokens(text: str) -> tuple[int, ...]:
    """Return the token ids of a text."""
    return tuple(chatml_tokenizer().encode(text, add_special_tokens=False).ids)


def text(token_ids: Sequence[int]) -> str:
    """Return the text of token ids, special tokens included."""
    return chatml_tokenizer().decode(list(token_ids), skip_special_tokens=False)
