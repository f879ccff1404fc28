"""Check that the files of `shared.model` exist and are complete. Reads headers, never tensors.

Without this check, a damaged file is reported by some library: after minutes, in many lines, or without its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import ConfigError

CONFIG = "config.json"
"""File name of a model's configuration."""
INDEX = "model.safetensors.index.json"
"""File name of the table tensor → shard, in models with several shards."""
_JSON = (CONFIG, INDEX, "generation_config.json", "tokenizer_config.json", "tokenizer.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?")
_LENGTH_BYTES = 8
"""A safetensors file starts with the length of its header, in this many bytes."""
_FIX = "Fix: restore the file, for example by downloading the model again."


def check_model_directory(model: str, *, needs_weights: bool = True) -> None:
    """Check that `model` is an id on the Hugging Face Hub or a directory with an undamaged model.

    Args:
        model: The value of `shared.model`.
        needs_weights: Also require a configuration and weights. If False, missing files are accepted.

    Raises:
        ConfigError: The model cannot be used. The message names the file and the problem.
    """
    directory = Path(model)
    if not directory.is_dir():
        if not directory.exists() and _HUB_ID.fullmatch(model):
            return
        what = "a file" if directory.exists() else "not a directory"
        hint = " Write the path without ~." if model.startswith("~") else ""
        raise ConfigError(
            f"shared.model: got {model}, which is {what}; expected a directory with a Hugging Face model (relative to "
            f"the folder of config.yaml) or an id on the hub, such as org/name.{hint}"
        )
    for name in _JSON:
        if (directory / name).exists():
            _read_object(directory / name)
        elif name == CONFIG and needs_weights:
            raise ConfigError(f"shared.model: {directory} has no {CONFIG}; expected a directory with a model")
    for shard in sorted(directory.glob("*.safetensors")):
        _check_shard(shard)
    if needs_weights and (missing := list(_missing_weights(directory))):
        raise ConfigError(f"shared.model: {directory} lacks {', '.join(missing[:3])}. {_FIX}")


def _missing_weights(directory: Path) -> Iterator[str]:
    if (directory / INDEX).exists():
        shards = _read_object(directory / INDEX).get("weight_map", {}).values()
        yield from sorted({name for name in map(str, shards) if not (directory / name).exists()})
    elif not any(True for pattern in _WEIGHTS for _ in directory.glob(pattern)):
        yield "weights, such as model.safetensors"


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"shared.model: {file} cannot be read: {error.strerror}. {_FIX}") from error
    except ValueError as error:
        raise ConfigError(f"shared.model: {file} is not JSON: {error}. {_FIX}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"shared.model: {file} holds {type(content).__name__}, expected an object. {_FIX}")
    return content


def _check_shard(file: Path) -> None:
    """Check that a safetensors file ends where its header says.

    Source: the safetensors format is 8 bytes with the length of the header, the header as JSON, and the tensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise ValueError(f"it has {size} bytes, which is less than its header says")
            header = json.loads(opened.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = _LENGTH_BYTES + length + max(ends, default=0)
        if size != expected:
            raise ValueError(f"it has {size} bytes, expected {expected}")
    except OSError as error:
        raise ConfigError(f"shared.model: {file} cannot be read: {error.strerror}. {_FIX}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"shared.model: {file} is not a complete safetensors file: {error}. {_FIX}") from error
