"""What the manifest says about the files in a staging directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .errors import StoreError
from .manifest import (
    ADAPTER_CONFIG_NAME,
    DELTA_SUFFIX,
    Changes,
    DeltaFile,
    FileEntry,
    Manifest,
    TensorEntry,
    digest_file,
    read_header,
)
from .messages import Kind
from .version import Version


class Contents(NamedTuple):
    """The files of a version that is about to be committed."""

    paths: list[Path]
    """All files in the directory that belong to the version."""
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    delta: Changes | None


def contents(
    staged: Path, version: Version, kind: Kind, digests: Mapping[str, str], parent: tuple[Manifest, str] | None
) -> Contents:
    """Return what the manifest says about the files in `staged`.

    Args:
        staged: The directory.
        version: Their version.
        kind: The kind of the version.
        digests: File name → digest. Other files are read. It must have those of complete files that are not there.
        parent: The version that deltas apply to, and the digest of its manifest.

    Raises:
        StoreError: A file in `digests` is missing, or its delta has no file in the parent.
    """
    shards = sorted(staged.glob("*.safetensors"))
    deltas = sorted(staged.glob(f"*.safetensors{DELTA_SUFFIX}"))
    configs = [staged / ADAPTER_CONFIG_NAME] if kind == "lora" else []
    paths = [*shards, *deltas, *configs]
    absent = {path.name.removesuffix(DELTA_SUFFIX) for path in deltas} - {path.name for path in shards}
    if missing := digests.keys() - {path.name for path in paths} - absent:
        raise StoreError(
            f"{min(missing)} of version {version} was written by another trainer process, but it is not in "
            f"{staged}. Fix: mount the same weights volume at shared.weights_dir for all trainer processes."
        )

    def digest(path: Path) -> str:
        return digests.get(path.name) or digest_file(path)

    inherited = _inherited(version, absent, digests, parent)
    found = [FileEntry(name=p.name, size_bytes=p.stat().st_size, xxh3_128=digest(p)) for p in [*shards, *configs]]
    tables = [tensor for shard in shards for tensor in read_header(shard)]
    if parent is None or not deltas:
        return Contents(paths, tuple(found), tuple(tables), None)
    tables += [tensor for tensor in parent[0].tensors if tensor.file in absent]
    entries = tuple(
        DeltaFile(file=p.name.removesuffix(DELTA_SUFFIX), size_bytes=p.stat().st_size, xxh3_128=digest(p))
        for p in deltas
    )
    changes = Changes(parent=parent[0].version, parent_digest=parent[1], files=entries)
    files = sorted([*found, *inherited], key=lambda file: file.name)
    return Contents(paths, tuple(files), tuple(tables), changes)


def _inherited(
    version: Version, absent: set[str], digests: Mapping[str, str], parent: tuple[Manifest, str] | None
) -> list[FileEntry]:
    """Return the entries of files of which only the delta is there. They have the size of the parent's files."""
    sizes = {file.name: file.size_bytes for file in parent[0].files} if parent else {}
    if unknown := {name for name in absent if name not in sizes or name not in digests}:
        raise StoreError(
            f"version {version} has a delta of {min(unknown)}, expected a parent with that file, and the digest of the "
            "complete file"
        )
    return [FileEntry(name=name, size_bytes=sizes[name], xxh3_128=digests[name]) for name in sorted(absent)]
