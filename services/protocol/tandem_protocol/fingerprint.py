"""Which model a directory holds, told without torch, so that trainer and generator can notice that theirs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .manifest import digest_bytes, digest_file, parameters_digest, read_header
from .messages import ModelFingerprint

_VOLATILE = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})
"""Keys of config.json that differ between saves of one and the same architecture."""


def fingerprint(model_dir: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> ModelFingerprint:
    """Fingerprint of the model in `model_dir`; `shapes` is its parameter table where the caller knows it."""
    config, tokenizer = model_dir / "config.json", model_dir / "tokenizer.json"
    return ModelFingerprint(
        config=_config_digest(config) if config.is_file() else None,
        tokenizer=digest_file(tokenizer) if tokenizer.is_file() else None,
        parameters=parameters_digest(shapes) if shapes else None,
    )


def checkpoint_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """The parameter table of the safetensors files in `model_dir`; empty where there are none."""
    return {
        tensor.name: tensor.shape for shard in sorted(model_dir.glob("*.safetensors")) for tensor in read_header(shard)
    }


def differences(ours: ModelFingerprint, theirs: ModelFingerprint) -> list[str]:
    """Which digests are known to both sides and differ: `config`, `tokenizer`, `parameters`."""
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in ModelFingerprint.model_fields}
    return [name for name, (our, their) in pairs.items() if our and their and our != their]


def _config_digest(path: Path) -> str:
    config = json.loads(path.read_text())
    return digest_bytes(json.dumps({key: config[key] for key in sorted(config) if key not in _VOLATILE}).encode())
