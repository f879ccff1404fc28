"""Which model a directory holds, told without torch, so that trainer and generator can notice that theirs differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from .manifest import TensorEntry, digest_bytes, digest_file, digest_tensor, parameters_digest, read_header
from .messages import ModelFingerprint

_VOLATILE = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})
"""Keys of config.json that differ between saves of one and the same architecture."""
_NOT_THE_MODEL = re.compile(r"adapter_|consolidated|optimizer|training_args|rng_state")
"""How files begin that lie beside a model's own: an adapter, another format of the same weights, a training's state."""
_OUTPUT_EMBEDDING = re.compile(r"^([\w]+\.)?(lm_head|embed_out|output|output_layer|output_projection)\.weight$")
_BASE_PREFIXES = dict.fromkeys(
    ("h", "wte", "wpe", "ln_f", "word_embeddings", "word_embeddings_layernorm"), "transformer."
)
"""First part of a name → what comes before it where a checkpoint leaves the base model's name out, as GPT-2's does."""


def fingerprint(model_dir: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> ModelFingerprint:
    """Fingerprint of the model in `model_dir`; `shapes` is its parameter table where the caller knows it."""
    config, tokenizer = model_dir / "config.json", model_dir / "tokenizer.json"
    return ModelFingerprint(
        config=_config_digest(config) if config.is_file() else None,
        tokenizer=digest_file(tokenizer) if tokenizer.is_file() else None,
        parameters=parameters_digest(shapes) if shapes else None,
    )


def model_files(model_dir: Path) -> list[Path]:
    """The safetensors files in `model_dir` that `transformers` would load; none if the weights are in other files."""
    whole, index = model_dir / "model.safetensors", model_dir / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return [model_dir / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if any(model_dir.glob("pytorch_model*.bin")):
        return []
    return [path for path in sorted(model_dir.glob("*.safetensors")) if not _NOT_THE_MODEL.match(path.name)]


def checkpoint_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """The parameter table of the safetensors files in `model_dir`, for who has no torch; empty where there are none.

    Only files that belong to the model count, and of them only parameters: a tied copy of the embeddings and buffers of
    old checkpoints are left out. Names are those that `transformers` would save.
    """
    entries = [entry for shard in model_files(model_dir) for entry in read_header(shard)]
    copies = _tied_copies(model_dir, entries)
    own = [entry for entry in entries if entry.name not in copies and not _is_buffer(entry)]
    return {_BASE_PREFIXES.get(entry.name.split(".")[0], "") + entry.name: entry.shape for entry in own}


def differences(ours: ModelFingerprint, theirs: ModelFingerprint) -> list[str]:
    """Which digests are known to both sides and differ: `config`, `tokenizer`, `parameters`."""
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in ModelFingerprint.model_fields}
    return [name for name, (our, their) in pairs.items() if our and their and our != their]


def _config_digest(path: Path) -> str:
    config = json.loads(path.read_text())
    return digest_bytes(json.dumps({key: config[key] for key in sorted(config) if key not in _VOLATILE}).encode())


def _tied_copies(model_dir: Path, entries: list[TensorEntry]) -> set[str]:
    """Output embeddings that hold what another matrix of the same shape holds, as files written without tying do."""
    config = model_dir / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("tie_word_embeddings") is False:
        return set()
    heads = [entry for entry in entries if _OUTPUT_EMBEDDING.match(entry.name)]
    return {
        head.name
        for head in heads
        for other in entries
        if other not in heads
        and (other.shape, other.dtype) == (head.shape, head.dtype)
        and digest_tensor(model_dir / other.file, other.name) == digest_tensor(model_dir / head.file, head.name)
    }


def _is_buffer(entry: TensorEntry) -> bool:
    """Masks and frequencies, which older releases of `transformers` saved."""
    return entry.name.endswith("inv_freq") or (entry.name.endswith("bias") and len(entry.shape) in (0, 4))
