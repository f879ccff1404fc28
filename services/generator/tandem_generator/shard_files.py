"""Read the tensors of a version's files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from safetensors import safe_open
from torch import Tensor


def tensors_of(shards: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of safetensors files, which are mapped into memory.

    While the tensors of a file are copied, the next file is read into memory, unless it is there. This host may not
    have read it before, because only one host of a replica verifies files.
    """
    with ThreadPoolExecutor(1, "read ahead") as reader:
        for path, following in zip(shards, [*shards[1:], None], strict=True):
            if following is not None:
                reader.submit(_read_ahead, following)
            with safe_open(path, framework="pt", device="cpu") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a mapping
                    yield name, shard.get_tensor(name)


def _read_ahead(path: str) -> None:
    """Have the kernel read a file into its page cache. An error is left to the one who opens the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
