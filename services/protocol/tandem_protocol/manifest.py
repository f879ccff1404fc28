"""What a version in the weight store consists of. A version without a manifest, which is written last, is none."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import xxhash
from pydantic import Field

from .messages import Kind, Message, ModelFingerprint
from .version import Version

MANIFEST_NAME = "manifest.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit that safetensors itself sets."""

ADAPTER_CONFIG_NAME = "adapter_config.json"


class FileEntry(Message):
    """One safetensors shard, or an adapter's configuration."""

    name: str = Field(pattern=r"^([\w.-]+\.safetensors|adapter_config\.json)$")
    """A plain file name: a manifest can never point outside its own directory."""
    size_bytes: int = Field(ge=0)
    xxh3_128: str


class TensorEntry(Message):
    """One tensor, under its Hugging Face name; `dtype` as safetensors spells it (`F32`, `BF16`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


class Manifest(Message):
    """A version's table of contents. The digest of its bytes is the version's identity."""

    format: Literal[1] = 1
    run: str
    """Name of the run that computed the version, for people who find the file."""
    version: Version
    kind: Kind = "full"
    fingerprint: ModelFingerprint
    """Of the model; for an adapter, of its base."""
    files: tuple[FileEntry, ...] = Field(min_length=1)
    tensors: tuple[TensorEntry, ...] = Field(min_length=1)

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1).encode()

    @property
    def size_bytes(self) -> int:
        """Of all shards together."""
        return sum(file.size_bytes for file in self.files)

    @property
    def lora_rank(self) -> int:
        """The largest rank of the adapter's matrices; 0 in a full version."""
        ranks = [tensor.shape[0] for tensor in self.tensors if tensor.name.endswith(".lora_A.weight")]
        return max(ranks, default=0)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tensor.shape for tensor in self.tensors}


Digest = xxhash.xxh3_128
"""Of bytes that come piece by piece; `hexdigest` gives what `FileEntry` holds."""


def digest_bytes(data: bytes) -> str:
    return Digest(data).hexdigest()


def digest_file(path: Path) -> str:
    """xxh3-128 of a file, read in pieces so that memory stays flat whatever its size."""
    hasher = Digest()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
    return hasher.hexdigest()


def parameters_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Digest of the table name → shape; dtypes are left out because either side may keep another precision."""
    return digest_bytes(json.dumps({name: list(shapes[name]) for name in sorted(shapes)}).encode())


def read_header(shard: Path) -> tuple[TensorEntry, ...]:
    """The tensor table in a safetensors file's own header, without reading any tensor.

    Raises:
        ValueError: the file does not start with such a header.
    """
    with shard.open("rb") as file:
        try:
            return tuple(
                TensorEntry(name=name, dtype=entry["dtype"], shape=tuple(entry["shape"]), file=shard.name)
                for name, entry in _header(file).items()
            )
        except (struct.error, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{shard} is not a safetensors file: {error}") from error


def digest_tensor(shard: Path, name: str) -> str:
    """xxh3-128 of the data of one tensor in a safetensors file."""
    hasher = Digest()
    with shard.open("rb") as file:
        start, end = _header(file)[name]["data_offsets"]
        file.seek(start, os.SEEK_CUR)
        while piece := file.read(min(1 << 20, end - start)):
            hasher.update(piece)
            start += len(piece)
    return hasher.hexdigest()


def _header(file: BinaryIO) -> dict[str, Any]:
    """Name → dtype, shape and offsets within the data, at whose beginning the file is left."""
    (length,) = struct.unpack("<Q", file.read(8))
    data = file.read(min(length, MAX_HEADER_BYTES))
    if len(data) < length:
        raise ValueError(f"its header has {len(data)} bytes, expected {length}")
    return {name: entry for name, entry in json.loads(data).items() if name != "__metadata__"}
