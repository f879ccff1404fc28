"""Write tensors into a safetensors file, one after the other. This module needs torch only, not transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from queue import Queue

import torch
from torch import Tensor

from tandem_protocol.manifest import Digest

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The dtypes that can be written → their names in safetensors files."""


CHUNK_BYTES = 1 << 20
"""Bytes that are digested and written at once. They stay in the processor's cache in between."""


def write_safetensors(path: Path, table: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> str:
    """Write `tensors`, which have the order of `table`, and flush them to disk. Returns the file's digest.

    safetensors' own `save_file` needs all tensors of a file in memory, and would need a second pass for the digest.

    Source: the format, in the README of huggingface/safetensors.
    """
    digest = Digest()
    with path.open("wb", buffering=0) as file:
        for data in chain([memoryview(_header(table))], map(_bytes, tensors)):
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                digest.update(chunk)
                while chunk:  # a write may be short
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_files(
    directory: Path, files: Mapping[str, Mapping[str, Tensor]], tensors: Iterable[tuple[str, Tensor]]
) -> dict[str, str]:
    """Write several safetensors files at the same time, each in a thread of its own, and flush them to disk.

    A thread has at most two tensors that are not written yet, so that few complete tensors are in memory.

    Args:
        files: File name → table: the names and shapes of its tensors, in the order in which they come.
        tensors: Names and tensors. Those that are in no file are skipped. All are taken, even if a file cannot be
            written, because other ranks may help to gather them.

    Returns:
        File name → digest.

    Raises:
        OSError: such as ENOSPC when the volume is full.
    """
    owner = {name: file for file, table in files.items() for name in table}
    queues: dict[str, Queue[Tensor | None]] = {file: Queue(maxsize=2) for file in files}
    with ThreadPoolExecutor(max(1, len(files))) as threads:
        written = {
            file: threads.submit(_write_all, directory / file, table, queues[file]) for file, table in files.items()
        }
        try:
            for name, tensor in tensors:
                if name in owner:
                    queues[owner[name]].put(tensor)
        finally:
            for queue in queues.values():
                queue.put(None)
            for _ in tensors:
                pass
    return {file: task.result() for file, task in written.items()}


def _write_all(path: Path, table: Mapping[str, Tensor], queue: Queue[Tensor | None]) -> str:
    tensors = _until_none(queue)
    try:
        return write_safetensors(path, table, tensors)
    finally:
        for _ in tensors:  # otherwise `put` would wait forever
            pass


def _until_none(queue: Queue[Tensor | None]) -> Iterator[Tensor]:
    while (tensor := queue.get()) is not None:
        yield tensor


def _header(table: Mapping[str, Tensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in table.items():
        start = end
        end += tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's data as a buffer. A tensor on the CPU is not copied."""
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
