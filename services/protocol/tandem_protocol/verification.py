"""Compare the files of a version with its manifest, several at the same time."""

from __future__ import annotations

import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import WeightsRefused
from .manifest import ADAPTER_CONFIG_NAME, DeltaFile, FileEntry, Manifest, TensorEntry, digest_file, read_header

THREADS = min(8, len(os.sched_getaffinity(0)))
"""Files that are read at the same time. A rank of the trainer writes 8 at most."""


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Check that every file in the directory matches the manifest in size, digest and tensor table.

    Of a file that is not there, its delta is checked. That does not show what the delta makes out of the parent. The
    delta of a file that is there is not read, because nobody needs it.

    Raises:
        WeightsRefused: A file is missing or differs. The message has the file, the actual and the expected value.
    """
    deltas = manifest.deltas
    absent = {name for name in deltas if not (directory / name).exists()}
    entries = [deltas[file.name] if file.name in absent else file for file in manifest.files]
    found = verified([(directory / entry.name, entry) for entry in entries])
    check_table(directory, found + [tensor for tensor in manifest.tensors if tensor.file in absent], manifest)


def check_table(directory: Path, found: list[TensorEntry], manifest: Manifest) -> None:
    """Check that the headers of the files have the manifest's tensor table.

    Raises:
        WeightsRefused: They have another one.
    """
    if sorted(found, key=lambda t: t.name) != sorted(manifest.tensors, key=lambda t: t.name):
        raise _refused(directory, "another tensor table in the shards' headers", "the manifest's tensor table")


def verified(files: Collection[tuple[Path, FileEntry | DeltaFile]]) -> list[TensorEntry]:
    """Return the tensors in files that match their entries. They are read by several threads.

    Raises:
        WeightsRefused: A file is missing or differs.
    """
    with ThreadPoolExecutor(max(1, min(len(files), THREADS))) as threads:
        return [tensor for table in threads.map(_verified, files) for tensor in table]


def _verified(file: tuple[Path, FileEntry | DeltaFile]) -> tuple[TensorEntry, ...]:
    """Return the tensor table of a file that matches its entry. Other files than shards have none."""
    path, entry = file
    try:
        size = path.stat().st_size
        if size != entry.size_bytes:
            raise _refused(path, f"{size} bytes", f"{entry.size_bytes}")
        if (digest := digest_file(path)) != entry.xxh3_128:
            raise _refused(path, f"xxh3-128 {digest}", entry.xxh3_128)
        is_shard = isinstance(entry, FileEntry) and entry.name != ADAPTER_CONFIG_NAME
        return read_header(path) if is_shard else ()
    except (OSError, ValueError) as error:
        raise _refused(path, str(error), "the file that the manifest lists") from error


def _refused(path: Path, got: str, expected: str) -> WeightsRefused:
    return WeightsRefused(
        f"{path}: got {got}, expected {expected}. The old version is still served. Fix: publish the step again; if the "
        "error persists, check the weights volume."
    )
