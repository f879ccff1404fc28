"""The difference between two files of the same size: which 16-bit words change, and their new values.

A delta compares bytes and never numbers, so -0.0 and the payloads of NaN are exact. It has new values instead of
differences. It does not prove that it fits a file: whoever applies it must check the digest of the result.

    magic    8 bytes
    sizes    3 little-endian uint64: bytes of the file, changed words, gaps
    blocks   one pair of little-endian uint64 per block: where its words and its gaps end
    words    little-endian uint16: the new words
    gaps     uint8: unchanged words before each changed one; 255 stands for 255 unchanged words and no change
    tail     the last byte of a file with an odd number of bytes

This is the only module of the package that needs numpy. It is imported when a delta is made or applied.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .manifest import Digest

Words = NDArray[np.uint16]
Positions = NDArray[np.int64]

BLOCK_WORDS = 1 << 20
"""Words that are patched, digested and written at once. The 2 MiB stay in a core's cache in between."""
THREADS = min(8, os.cpu_count() or 1)
_MAGIC = b"TDELTA1\n"
_SIZES = struct.Struct("<QQQ")
_SKIP = 255


class BrokenDelta(ValueError):
    """The bytes are not a delta, or it does not fit the file."""


class Delta(NamedTuple):
    """The changed words of one file."""

    size_bytes: int
    """Size of the file."""
    ends: NDArray[np.uint64]
    """[blocks + 1, 2] Where the words and the gaps of each block end. The first row is 0."""
    words: Words
    """[changed] The new words."""
    gaps: NDArray[np.uint8]
    """Unchanged words before each changed one."""
    tail: bytes
    """The last byte of a file with an odd number of bytes."""

    def block(self, index: int) -> tuple[Positions, Words]:
        """Return the positions of the changed words within a block, and the new words.

        Raises:
            BrokenDelta: A position is outside the block, or there are more positions than words.
        """
        (first, start), (last, end) = self.ends[index : index + 2].tolist()
        positions, words = _positions(self.gaps[start:end]), self.words[first:last]
        length = min(BLOCK_WORDS, self.size_bytes // 2 - index * BLOCK_WORDS)
        if len(positions) != len(words) or (len(positions) and positions[-1] >= length):
            raise BrokenDelta(f"block {index} has {len(positions)} positions for {len(words)} words of {length}")
        return positions, words


def encode(positions: NDArray[np.integer[Any]], file: NDArray[np.uint8]) -> bytes:
    """Return the delta that makes `file` out of a file which differs only at some words.

    Args:
        positions: [changed] The positions of the words that may differ, in increasing order, of any integer type.
        file: [size] The bytes of the new file.
    """
    words = _words(file)
    starts = [*range(0, len(words), BLOCK_WORDS)]
    edges = np.searchsorted(positions, np.array([*starts, len(words)], positions.dtype)).tolist()
    new, gaps = [], []
    for start, (first, last) in zip(starts, pairwise(edges), strict=True):
        block = positions[first:last].astype(np.int64)
        new.append(words[block].astype("<u2"))
        gaps.append(_gaps(block - start))
    table = np.column_stack((edges[1:], np.cumsum([len(part) for part in gaps], dtype=np.int64))).astype("<u8")
    sizes = _SIZES.pack(len(file), len(positions), sum(map(len, gaps)))
    data = (part.tobytes() for part in (table, *new, *gaps))
    return b"".join((_MAGIC, sizes, *data, file[2 * len(words) :].tobytes()))


def decode(data: bytes) -> Delta:
    """Return the delta in `data`.

    Raises:
        BrokenDelta: `data` is damaged, cut short, or of another format.
    """
    start = len(_MAGIC) + _SIZES.size
    if len(data) < start or not data.startswith(_MAGIC):
        raise BrokenDelta(f"got a file that begins with {data[:8]!r}, expected {_MAGIC!r}")
    size_bytes, changed, count = _SIZES.unpack_from(data, len(_MAGIC))
    blocks = -(-(size_bytes // 2) // BLOCK_WORDS)
    expected = start + 16 * blocks + 2 * changed + count + size_bytes % 2
    if len(data) != expected:
        raise BrokenDelta(f"got {len(data)} bytes, expected {expected}")
    ends = np.zeros((blocks + 1, 2), np.uint64)
    ends[1:] = np.frombuffer(data, "<u8", 2 * blocks, start).reshape(-1, 2)
    if (ends[1:] < ends[:-1]).any() or ends[-1].tolist() != [changed, count]:
        raise BrokenDelta("its table of blocks does not fit its number of words")
    words = np.frombuffer(data, "<u2", changed, start + 16 * blocks)
    gaps = np.frombuffer(data, np.uint8, count, start + 16 * blocks + 2 * changed)
    return Delta(size_bytes, ends, words, gaps, data[len(data) - size_bytes % 2 :])


def changed_words(old: NDArray[np.uint8], new: NDArray[np.uint8]) -> Positions:
    """Return the positions at which the words of two files of the same size differ."""
    return np.flatnonzero(_words(old) != _words(new))


def apply(base: Path, chain: Sequence[Delta], target: Path) -> str:
    """Write the file that `chain` makes out of `base`, which is left alone, to `target`.

    If `target` exists it is overwritten in place, because memory that is already there costs half as much.

    Returns:
        The xxh3-128 digest of what was written, which the caller must check.

    Raises:
        BrokenDelta: A delta does not fit the file.
        OSError: A file cannot be read or written.
    """
    digest = Digest()
    with target.open("r+b" if target.exists() else "wb", buffering=0) as file:
        for piece in _patched(base, chain):
            digest.update(piece)
            while piece:  # a write may be short
                piece = piece[file.write(piece) :]
        file.truncate()
    return digest.hexdigest()


def _patched(base: Path, chain: Sequence[Delta]) -> Iterator[memoryview]:
    """Yield the new file in pieces, of which some are computed ahead. A piece is valid until the next one is asked."""
    size_bytes = base.stat().st_size
    if wrong := [delta.size_bytes for delta in chain if delta.size_bytes != size_bytes]:
        raise BrokenDelta(f"got a delta for a file of {wrong[0]} bytes, expected {size_bytes}")
    words = size_bytes // 2
    buffers = [np.empty(BLOCK_WORDS, "<u2") for _ in range(THREADS + 1)]  # used again: new memory costs more

    with base.open("rb") as source, ThreadPoolExecutor(THREADS) as pool:

        def block(index: int) -> memoryview:
            piece = buffers[index % len(buffers)][: words - index * BLOCK_WORDS]
            if os.preadv(source.fileno(), [piece.data], 2 * index * BLOCK_WORDS) != piece.nbytes:
                raise BrokenDelta(f"{base} became shorter while it was read")
            for delta in chain:
                positions, new = delta.block(index)
                piece[positions] = new
            return piece.data.cast("B")

        ahead: deque[Future[memoryview]] = deque()
        for index in range(-(-words // BLOCK_WORDS)):
            ahead.append(pool.submit(block, index))
            if len(ahead) > THREADS:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)
        if size_bytes % 2:
            yield memoryview(chain[-1].tail if chain else os.pread(source.fileno(), 1, size_bytes - 1))


def _words(file: NDArray[np.uint8]) -> Words:
    return file[: len(file) // 2 * 2].view("<u2")


def _gaps(positions: Positions) -> NDArray[np.uint8]:
    """Return how many unchanged words lie before each position, in steps that fit a byte."""
    skips, rest = np.divmod(np.diff(positions, prepend=-1) - 1, _SKIP)
    ends = np.cumsum(skips + 1) - 1
    gaps = np.full(int(ends[-1]) + 1 if len(positions) else 0, _SKIP, np.uint8)
    gaps[ends] = rest
    return gaps


def _positions(gaps: NDArray[np.uint8]) -> Positions:
    """The inverse of `_gaps`."""
    ends = np.cumsum(gaps, dtype=np.int64)[gaps < _SKIP]
    return ends + np.arange(len(ends), dtype=np.int64)
