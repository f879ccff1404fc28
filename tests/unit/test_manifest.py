"""A manifest lists files and tensors. Its digest identifies the version."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import save_file

from support.weights import tensors
from tandem_protocol.manifest import FileEntry, Manifest, digest_file, parameters_digest, read_header

SHAPES = {"a": (2, 3), "b": (4,)}


def write_header(path: Path, header: object) -> Path:
    data = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    return path


@pytest.mark.parametrize("name", ["../x.safetensors", "a/x.safetensors", "/x.safetensors", "x.bin", "x.safetensors\n"])
def test_a_manifest_cannot_point_outside_its_directory(name: str) -> None:
    with pytest.raises(ValidationError):
        FileEntry(name=name, size_bytes=1, xxh3_128="0")


def test_a_manifest_without_files_or_tensors_is_refused() -> None:
    with pytest.raises(ValidationError) as caught:
        Manifest.model_validate({"run": "r", "version": "1.1", "fingerprint": {}, "files": [], "tensors": []})
    assert {problem["loc"][0] for problem in caught.value.errors()} == {"files", "tensors"}


def test_read_header_returns_the_tensor_table_of_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.safetensors"
    save_file(tensors(1) | {"half": np.zeros((2, 0), np.float16)}, path, metadata={"format": "pt"})
    found = {entry.name: (entry.dtype, entry.shape, entry.file) for entry in read_header(path)}
    assert found == {
        "embed.weight": ("F32", (8, 4), path.name),
        "norm.weight": ("F32", (4,), path.name),
        "half": ("F16", (2, 0), path.name),
    }


@pytest.mark.parametrize(
    "content",
    [b"", b"\x01\x00", struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 2) + b"[]", b"PK\x03\x04" * 64],
    ids=["empty", "short", "length lies", "list", "zip"],
)
def test_a_file_in_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize("entry", [1, {"dtype": "F32"}, {"dtype": "F32", "shape": 3}, {"dtype": 7, "shape": [1]}])
def test_a_header_with_a_broken_entry_is_refused(tmp_path: Path, entry: object) -> None:
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_header(write_header(tmp_path / "x.safetensors", {"w": entry}))


@given(st.binary(max_size=1 << 12), st.integers(0, 3))
def test_the_digest_of_a_file_is_the_digest_of_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, mebibytes: int
) -> None:
    data = bytes(mebibytes << 20) + tail
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(data)
    assert digest_file(path) == xxhash.xxh3_128_hexdigest(data)


def test_the_parameter_digest_depends_on_names_and_shapes_but_not_on_order() -> None:
    same = parameters_digest(dict(reversed(SHAPES.items())))
    assert parameters_digest(SHAPES) == same
    others: list[dict[str, tuple[int, ...]]] = [{"a": (3, 2), "b": (4,)}, {"a": (2, 3)}, {"a": (2, 3), "c": (4,)}]
    assert same not in {parameters_digest(other) for other in others}
