"""Reads the model's size from its config.json and the headers of its safetensors files. No tensor is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem_protocol.fingerprint import checkpoint_shapes

from .facts import Model
from .unknown import Refused, Unknown

NO_MODEL = "the model's size is not known"


def read_model(folder: Path) -> Model | Unknown:
    """Read the model in a directory."""
    try:
        config = json.loads((folder / "config.json").read_text())
        parameters = sum(math.prod(shape) for shape in checkpoint_shapes(folder).values())
        return parse_model(config, parameters or None, f"the folder {folder}")
    except (OSError, ValueError) as error:
        fix = f"put a Hugging Face model with config.json and safetensors files into {folder}"
        return Refused(NO_MODEL, fix, f"the model in {folder} cannot be read: {error}")


def parse_model(config: Mapping[str, Any], parameters: int | None, where: str, *, is_local: bool = True) -> Model:
    """Build the model from its config.json. Without `parameters`, their number is estimated.

    Raises:
        ValueError: config.json does not have the sizes of a decoder.
    """
    sizes = config.get("text_config") or config
    try:
        layers, hidden, heads = (sizes[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        vocab = sizes["vocab_size"]
        intermediate = sizes.get("intermediate_size") or 4 * hidden
        kv_heads = sizes.get("num_key_value_heads") or heads
        head_dim = sizes.get("head_dim") or hidden // heads
        return Model(
            where=where,
            parameters=parameters or _count_parameters(sizes, intermediate, head_dim, kv_heads),
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=vocab,
            max_positions=sizes.get("max_position_embeddings") or 4096,
            is_local=is_local,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"its config.json lacks the key {error}") from error


def _count_parameters(sizes: Mapping[str, Any], intermediate: int, head_dim: int, kv_heads: int) -> int:
    """Estimate the parameters of a Llama-like decoder.

    A layer is q, k, v, o (hidden × head_dim × heads each) and gate, up, down (hidden × intermediate). Norms are left
    out. The embedding counts twice if the output has its own.
    """
    hidden = sizes["hidden_size"]
    heads = sizes["num_attention_heads"]
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    layer = attention + 3 * hidden * intermediate
    embeddings = 1 if sizes.get("tie_word_embeddings") else 2
    return int(sizes["num_hidden_layers"] * layer + embeddings * sizes["vocab_size"] * hidden)
