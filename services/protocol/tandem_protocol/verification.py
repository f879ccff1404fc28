"""Compare the files of a version with its manifest, several at the same time."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import WeightsRefused
from .manifest import ADAPTER_CONFIG_NAME, FileEntry, Manifest, TensorEntry, digest_file, read_header

THREADS = min(8, len(os.sched_getaffinity(0)))
"""Files that are read at the same time. A rank of the trainer writes 8 at most."""


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Check that every file matches the manifest in size, digest and tensor table.

    Raises:
        WeightsRefused: A file is missing or differs. The message has the file, the actual and the expected value.
    """
    with ThreadPoolExecutor(min(len(manifest.files), THREADS)) as threads:
        tables = threads.map(_verified, [directory / entry.name for entry in manifest.files], manifest.files)
        found = [tensor for table in tables for tensor in table]
    if sorted(found, key=lambda t: t.name) != sorted(manifest.tensors, key=lambda t: t.name):
        raise _refused(directory, "another tensor table in the shards' headers", "the manifest's tensor table")


def _verified(path: Path, entry: FileEntry) -> tuple[TensorEntry, ...]:
    """Return the tensor table of a file that matches its entry."""
    try:
        size = path.stat().st_size
        if size != entry.size_bytes:
            raise _refused(path, f"{size} bytes", f"{entry.size_bytes}")
        if (digest := digest_file(path)) != entry.xxh3_128:
            raise _refused(path, f"xxh3-128 {digest}", entry.xxh3_128)
        return () if path.name == ADAPTER_CONFIG_NAME else read_header(path)
    except (OSError, ValueError) as error:
        raise _refused(path, str(error), "the file that the manifest lists") from error


def _refused(path: Path, got: str, expected: str) -> WeightsRefused:
    return WeightsRefused(
        f"{path}: got {got}, expected {expected}. The old version is still served. Fix: publish the step again; if the "
        "error persists, check the weights volume."
    )
