"""Table of contents of a version in the weight store.

The manifest is written last. A directory without a manifest is not a version.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import xxhash
from pydantic import Field, model_validator

from .messages import Kind, Message, ModelFingerprint
from .version import Version

MANIFEST_NAME = "manifest.json"
"""File name of the manifest in a version's directory."""
MAX_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file, in bytes. The safetensors library sets the same limit."""

ADAPTER_CONFIG_NAME = "adapter_config.json"
"""File name of an adapter's configuration, as peft writes it."""
DELTA_SUFFIX = ".delta"
"""What the name of a file's delta has after the name of the file."""


class FileEntry(Message):
    """One file of a version: a safetensors shard, or an adapter's configuration."""

    name: str = Field(pattern=r"^([\w.-]+\.safetensors|adapter_config\.json)$")
    """File name without a directory, so that a manifest cannot point outside its own directory."""
    size_bytes: int = Field(ge=0)
    """Size of the file."""
    xxh3_128: str
    """xxh3-128 digest of the file, in hexadecimal."""


class TensorEntry(Message):
    """One tensor of a version."""

    name: str
    """Name of the tensor in a Hugging Face checkpoint."""
    dtype: str
    """Data type as safetensors spells it, such as `F32` or `BF16`."""
    shape: tuple[int, ...]
    """Shape of the tensor."""
    file: str
    """Name of the shard that contains the tensor."""


class DeltaFile(Message):
    """The file that says what changes in one file of the parent."""

    file: str = Field(pattern=r"^[\w.-]+\.safetensors$")
    """Name of the file that comes out. The delta lies beside it, as `FILE.delta`."""
    size_bytes: int = Field(ge=0)
    """Size of the delta."""
    xxh3_128: str
    """xxh3-128 digest of the delta, in hexadecimal."""

    @property
    def name(self) -> str:
        """Name of the delta."""
        return self.file + DELTA_SUFFIX


class Changes(Message):
    """How a version is made out of another one, its parent."""

    parent: Version
    """The parent."""
    parent_digest: str
    """Digest of the parent's manifest, in hexadecimal."""
    files: tuple[DeltaFile, ...] = Field(min_length=1)
    """The deltas. A file of the version without a delta lies in its directory."""


class Manifest(Message):
    """Table of contents of a version. The digest of its bytes identifies the version."""

    format: Literal[1, 2] = 1
    """Version of the manifest format: 2 if there is a `delta`, else 1. Releases without deltas refuse 2."""
    run: str
    """Name of the training run that computed the version. It is for people who read the file."""
    version: Version
    """Name of the version."""
    kind: Kind = "full"
    """Whether the files hold a full model or an adapter."""
    fingerprint: ModelFingerprint
    """Fingerprint of the model. For an adapter, of its base model."""
    files: tuple[FileEntry, ...] = Field(min_length=1)
    """All files of the version except the manifest. Sizes and digests are those of the complete files, also if only
    their deltas are in the directory."""
    tensors: tuple[TensorEntry, ...] = Field(min_length=1)
    """All tensors of the version."""
    delta: Changes | None = None
    """How the version is made out of another one. None: all files are in its directory."""

    @model_validator(mode="after")
    def _format_says_whether_there_are_deltas(self) -> Manifest:
        if (self.format == 2) != (self.delta is not None):
            raise ValueError(f"got format {self.format}, expected 2 with delta, and 1 without")
        if self.delta and not self.delta.parent < self.version:
            raise ValueError(f"got parent {self.delta.parent}, expected one that is older than {self.version}")
        return self

    def to_bytes(self) -> bytes:
        """Return the manifest as it is stored on disk."""
        return self.model_dump_json(indent=1, exclude=None if self.delta else {"delta"}).encode()

    @property
    def size_bytes(self) -> int:
        """Total size of all files, in bytes."""
        return sum(file.size_bytes for file in self.files)

    @property
    def deltas(self) -> dict[str, DeltaFile]:
        """File name → its delta, for the files that have one."""
        return {delta.file: delta for delta in self.delta.files} if self.delta else {}

    @property
    def lora_rank(self) -> int:
        """Largest rank of the adapter's matrices. 0 for a full version."""
        ranks = [tensor.shape[0] for tensor in self.tensors if tensor.name.endswith(".lora_A.weight")]
        return max(ranks, default=0)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter table: tensor name → shape."""
        return {tensor.name: tensor.shape for tensor in self.tensors}


Digest = xxhash.xxh3_128
"""Incremental digest for data that arrives in chunks. Its `hexdigest` gives the value of `FileEntry.xxh3_128`."""


def digest_bytes(data: bytes | memoryview) -> str:
    """Return the xxh3-128 digest of `data`, in hexadecimal."""
    return Digest(data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the xxh3-128 digest of a file, in hexadecimal. The file is read in chunks of 1 MiB."""
    hasher = Digest()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            hasher.update(buffer[:size])
    return hasher.hexdigest()


def parameters_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the digest of a parameter table, name → shape.

    Dtypes are not part of it, because trainer and generator may keep the parameters in different precisions.
    """
    return digest_bytes(json.dumps({name: list(shapes[name]) for name in sorted(shapes)}).encode())


def read_header(shard: Path) -> tuple[TensorEntry, ...]:
    """Read the tensor table from the header of a safetensors file. No tensor is read.

    Raises:
        ValueError: The file does not start with a valid header.
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
    """Return the xxh3-128 digest of the data of one tensor in a safetensors file."""
    hasher = Digest()
    with shard.open("rb") as file:
        start, end = _header(file)[name]["data_offsets"]
        file.seek(start, os.SEEK_CUR)
        while chunk := file.read(min(1 << 20, end - start)):
            hasher.update(chunk)
            start += len(chunk)
    return hasher.hexdigest()


def _header(file: BinaryIO) -> dict[str, Any]:
    """Read the header: name → dtype, shape and offsets in the data. Leaves `file` at the beginning of the data."""
    (length,) = struct.unpack("<Q", file.read(8))
    data = file.read(min(length, MAX_HEADER_BYTES))
    if len(data) < length:
        raise ValueError(f"its header has {len(data)} bytes, expected {length}")
    return {name: entry for name, entry in json.loads(data).items() if name != "__metadata__"}
