"""Identify the model in a directory, without torch.

Trainer and generator compare their fingerprints to find out whether they work with the same model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from .manifest import TensorEntry, digest_bytes, digest_file, digest_tensor, parameters_digest, read_header
from .messages import ModelFingerprint

_VOLATILE = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})
"""Keys of config.json that may differ between two saves of the same architecture."""
_NOT_THE_MODEL = re.compile(r"adapter_|consolidated|optimizer|training_args|rng_state")
"""Prefixes of safetensors files that are not the model: an adapter, another weight format, a training state."""
_OUTPUT_EMBEDDING = re.compile(r"^([\w]+\.)?(lm_head|embed_out|output|output_layer|output_projection)\.weight$")
_BASE_PREFIXES = dict.fromkeys(
    ("h", "wte", "wpe", "ln_f", "word_embeddings", "word_embeddings_layernorm"), "transformer."
)
"""First part of a tensor name → prefix to add. Some checkpoints, such as GPT-2's, omit the base model's name."""


def fingerprint(model_dir: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> ModelFingerprint:
    """Compute the fingerprint of the model in `model_dir`.

    Args:
        model_dir: Directory of a Hugging Face model.
        shapes: Parameter table of the model, name → shape. Without it, the fingerprint has no `parameters`.
    """
    config = model_dir / "config.json"
    tokenizer = model_dir / "tokenizer.json"
    return ModelFingerprint(
        config=_config_digest(config) if config.is_file() else None,
        tokenizer=digest_file(tokenizer) if tokenizer.is_file() else None,
        parameters=parameters_digest(shapes) if shapes else None,
    )


def model_files(model_dir: Path) -> list[Path]:
    """Return the safetensors files in `model_dir` that `transformers` would load.

    The list is empty if the weights are stored in another format.
    """
    single_file = model_dir / "model.safetensors"
    index = model_dir / "model.safetensors.index.json"
    if single_file.is_file():
        return [single_file]
    if index.is_file():
        return [model_dir / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if any(model_dir.glob("pytorch_model*.bin")):
        return []
    return [path for path in sorted(model_dir.glob("*.safetensors")) if not _NOT_THE_MODEL.match(path.name)]


def checkpoint_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Read the parameter table from the headers of the safetensors files in `model_dir`.

    A tied copy of the embeddings is left out, and so are the buffers in old checkpoints. Names are those that
    `transformers` would save.

    Returns:
        Name → shape. Empty if there are no safetensors files.
    """
    entries = [entry for shard in model_files(model_dir) for entry in read_header(shard)]
    copies = _tied_copies(model_dir, entries)
    parameters = [entry for entry in entries if entry.name not in copies and not _is_buffer(entry)]
    return {_BASE_PREFIXES.get(entry.name.split(".")[0], "") + entry.name: entry.shape for entry in parameters}


def differences(ours: ModelFingerprint, theirs: ModelFingerprint) -> list[str]:
    """Compare two fingerprints.

    Returns:
        Names of the digests that both sides know and that differ: `config`, `tokenizer`, `parameters`.
    """
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in ModelFingerprint.model_fields}
    return [name for name, (our, their) in pairs.items() if our and their and our != their]


def _config_digest(path: Path) -> str:
    config = json.loads(path.read_text())
    return digest_bytes(json.dumps({key: config[key] for key in sorted(config) if key not in _VOLATILE}).encode())


def _tied_copies(model_dir: Path, entries: list[TensorEntry]) -> set[str]:
    """Names of the output embeddings that are byte-for-byte copies of another matrix in the checkpoint."""
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
    """Whether the tensor is an attention mask or a rotary frequency, which older releases of `transformers` saved."""
    return entry.name.endswith("inv_freq") or (entry.name.endswith("bias") and len(entry.shape) in (0, 4))
