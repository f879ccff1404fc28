"""Whether `shared.model` can be a model: its files are there and whole. Reads headers, never tensors.

Libraries tell such faults in many lines, or after minutes, or without the name of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import ConfigError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_JSON = (CONFIG, INDEX, "generation_config.json", "tokenizer_config.json", "tokenizer.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?")
_LENGTH_BYTES = 8
"""Before a safetensors header: how long it is."""
_FIX = "Fix: restore the file, for example by downloading the model again."


def check_model(model: str, *, is_whole: bool = True) -> None:
    """Refuse what is neither a model's directory nor an id on the hub.

    Args:
        is_whole: it has to hold a configuration and weights, and not just none that are damaged.

    Raises:
        ConfigError: names the file, and what is wrong with it.
    """
    directory = Path(model)
    if not directory.is_dir():
        if not directory.exists() and _HUB_ID.fullmatch(model):
            return
        what = "a file" if directory.exists() else "not a directory"
        hint = " A path has to be written out, without ~." if model.startswith("~") else ""
        raise ConfigError(
            f"shared.model: got {model}, which is {what}; expected a directory with a Hugging Face model (relative to "
            f"the folder of config.yaml) or an id on the hub, such as org/name.{hint}"
        )
    for name in _JSON:
        if (directory / name).exists():
            _read_object(directory / name)
        elif name == CONFIG and is_whole:
            raise ConfigError(f"shared.model: {directory} has no {CONFIG}; expected a directory with a model")
    for shard in sorted(directory.glob("*.safetensors")):
        _check_shard(shard)
    if is_whole and (missing := list(_missing_weights(directory))):
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
    """That the file ends where its header says.

    Source: the safetensors format: 8 bytes with the header's length, the header in JSON, the tensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise ValueError(f"it has {size} bytes, and its header alone would be longer")
            header = json.loads(opened.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = _LENGTH_BYTES + length + max(ends, default=0)
        if size != expected:
            raise ValueError(f"it has {size} bytes, expected {expected}")
    except OSError as error:
        raise ConfigError(f"shared.model: {file} cannot be read: {error.strerror}. {_FIX}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"shared.model: {file} is not a whole safetensors file: {error}. {_FIX}") from error
