"""The copy of the version that was published last, in host memory. A delta says where the next version differs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tandem_protocol.delta import THREADS, changed_words, encode
from tandem_protocol.errors import StoreError
from tandem_protocol.manifest import DELTA_SUFFIX, Digest, digest_bytes
from tandem_protocol.version import Version

from .learner.safetensors_file import CHUNK_BYTES, data_of, header_of

MAX_DELTA = 0.5
"""A delta above this fraction of its file is not worth the work. The complete file is written instead."""
_WORD_BYTES = 3
"""Bytes that a changed word takes in a delta at least: two, and one for the gap before it."""

Positions = NDArray[np.unsignedinteger[Any]]
"""Positions of words in a file, in increasing order. They have 4 bytes each if the file has at most 8 GiB."""
Files = Mapping[str, Mapping[str, Tensor]]
"""File name → its table: the names, dtypes and shapes of its tensors, in order."""


class Plan(NamedTuple):
    """What is written of a version."""

    version: Version
    """The version."""
    parent: Version | None = None
    """The version that deltas apply to. None: only complete files are written."""
    complete: bool = False
    """Write the complete files beside the deltas, so that nobody needs the parent."""


class PublishedCopy:
    """The bytes of the files that this rank has published last.

    Args:
        files: The files of every version. Other files need another copy.
    """

    def __init__(self, files: Files) -> None:
        self.version: Version | None = None
        """The version that the copy holds. None while it is being replaced, and if that failed."""
        self._bytes: dict[str, NDArray[np.uint8]] = {}
        self._places: dict[str, tuple[str, int]] = {}
        for file, table in files.items():
            header = header_of(table)
            start = len(header)
            for name, tensor in table.items():
                self._places[name] = file, start
                start += tensor.nbytes
            self._bytes[file] = np.zeros(start, np.uint8)
            self._bytes[file][: len(header)] = np.frombuffer(header, np.uint8)

    def write(
        self, directory: Path, files: Files, tensors: Iterable[tuple[str, Tensor]], *, plan: Plan
    ) -> dict[str, str]:
        """Replace the copy by `tensors`, write what is planned, and flush it to disk.

        Args:
            files: The files that the copy was made for.
            tensors: All tensors, in any order. Those that are in no file are skipped. All are taken.

        Returns:
            File name → digest: of every complete file, also if only its delta is written, and of every delta.

        Raises:
            OSError: such as ENOSPC when the volume is full.
        """
        has_parent = plan.parent is not None and plan.parent == self.version
        self.version = None
        with ThreadPoolExecutor(THREADS) as pool:
            changes = self._replace(tensors, pool, compare=has_parent)
            parts = pool.map(lambda file: self._write(directory, file, changes.get(file), plan), files)
            digests = {name: digest for part in parts for name, digest in part.items()}
        self.version = plan.version
        return digests

    def write_complete(self, directory: Path, is_given_up: Callable[[], bool] = lambda: False) -> dict[str, str]:
        """Write the complete files, and flush them to disk. Returns file name → digest.

        Raises:
            OSError: such as ENOSPC when the volume is full.
            StoreError: `is_given_up` has become true.
        """
        write = partial(_write_file, is_given_up=is_given_up)
        with ThreadPoolExecutor(THREADS) as pool:
            digests = pool.map(lambda file: write(directory / file, self._bytes[file]), self._bytes)
            return dict(zip(self._bytes, digests, strict=True))

    def _replace(
        self, tensors: Iterable[tuple[str, Tensor]], pool: ThreadPoolExecutor, *, compare: bool
    ) -> dict[str, Positions]:
        """Replace the copy. Returns file name → the positions of its changed words, for files with few of them."""
        found: dict[str, list[Positions]] = {file: [] for file in self._bytes} if compare else {}
        for name, tensor in tensors:
            if name not in self._places:
                continue
            file, start = self._places[name]
            new = np.frombuffer(data_of(tensor), np.uint8)

            def part(at: int, file: str = file, start: int = start, new: NDArray[np.uint8] = new) -> None:
                parts = found.get(file)
                positions = _replaced(
                    self._bytes[file], start + at, new[at : at + CHUNK_BYTES], compare=parts is not None
                )
                if parts is not None:
                    parts.append(positions)
                    if sum(map(len, parts)) * _WORD_BYTES > MAX_DELTA * len(self._bytes[file]):
                        found.pop(file, None)  # their positions would take memory for nothing

            deque(pool.map(part, range(0, len(new), CHUNK_BYTES)), maxlen=0)
        return {file: _sorted(parts) for file, parts in found.items()}

    def _write(self, directory: Path, file: str, changed: Positions | None, plan: Plan) -> dict[str, str]:
        data = self._bytes[file]
        delta = encode(changed, data) if changed is not None else None
        if delta is None or len(delta) > MAX_DELTA * len(data):
            return {file: _write_file(directory / file, data)}
        name = file + DELTA_SUFFIX
        full = _write_file(directory / file, data) if plan.complete else digest_bytes(data.data)
        return {name: _write_file(directory / name, np.frombuffer(delta, np.uint8)), file: full}


def _replaced(file: NDArray[np.uint8], start: int, new: NDArray[np.uint8], *, compare: bool) -> Positions:
    """Replace bytes of a file from `start` on. Returns the positions of the words that differ, in words of the file."""
    end, dtype = start + len(new), np.result_type(np.uint32, np.min_scalar_type(len(file) // 2))
    if not compare:
        file[start:end] = new
        return np.empty(0, dtype)
    first, last = start - start % 2, min(end + end % 2, len(file))  # whole words
    old = file[first:last].copy()
    file[start:end] = new
    return (changed_words(old, file[first:last]) + first // 2).astype(dtype)


def _sorted(parts: list[Positions]) -> Positions:
    """Return the positions of all parts. A part begins behind the one before it, or shares its last word."""
    ordered = sorted((part for part in parts if len(part)), key=lambda part: (part[0], part[-1]))
    shared = [0, *(int(one[-1] == other[0]) for one, other in pairwise(ordered))]
    if not ordered:
        return parts[0] if parts else np.empty(0, np.uint32)
    return np.concatenate([part[skip:] for part, skip in zip(ordered, shared, strict=True)])


def _write_file(path: Path, data: NDArray[np.uint8], is_given_up: Callable[[], bool] = lambda: False) -> str:
    digest = Digest()
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), CHUNK_BYTES):
            if is_given_up():
                raise StoreError("the complete files are not needed any more")
            chunk = data[start : start + CHUNK_BYTES].data
            digest.update(chunk)
            while chunk:  # a write may be short
                chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return digest.hexdigest()
