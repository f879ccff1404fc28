"""Write tensors into a safetensors file, one after the other. This module needs torch only, not transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Semaphore

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

        def write(data: memoryview) -> None:
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                digest.update(chunk)
                while chunk:  # a write may be short
                    chunk = chunk[file.write(chunk) :]

        write(memoryview(header_of(table)))
        for _ in map(write, map(data_of, tensors)):  # keeps no tensor while it waits for the next
            pass
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_files(
    directory: Path, files: Mapping[str, Mapping[str, Tensor]], tensors: Iterable[tuple[str, Tensor]]
) -> dict[str, str]:
    """Write several safetensors files at the same time, each in a thread of its own, and flush them to disk.

    At most twice as many complete tensors as files are in memory, counting the one that `tensors` makes.

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
    queues: dict[str, Queue[list[Tensor]]] = {file: Queue() for file in files}
    room = Semaphore(2 * len(files) - 1 if files else 0)
    with ThreadPoolExecutor(max(1, len(files))) as threads:
        written = {
            file: threads.submit(_write_all, directory / file, table, _taken(queues[file], room))
            for file, table in files.items()
        }
        try:
            for name, tensor in tensors:
                if name in owner:
                    room.acquire()
                    queues[owner[name]].put([tensor])
                del tensor  # otherwise it would stay in memory while the next one is made
        finally:
            for queue in queues.values():
                queue.put([])
    return {file: task.result() for file, task in written.items()}


def _write_all(path: Path, table: Mapping[str, Tensor], tensors: Iterator[Tensor]) -> str:
    try:
        return write_safetensors(path, table, tensors)
    finally:
        for _ in tensors:  # otherwise there would be no room for those of the other files
            pass


def _taken(queue: Queue[list[Tensor]], room: Semaphore) -> Iterator[Tensor]:
    """Yield the tensors of a file until an empty list comes. Each is written when the next one is asked for."""
    while item := queue.get():
        yield item.pop()
        room.release()


def header_of(table: Mapping[str, Tensor]) -> bytes:
    """The beginning of a safetensors file: everything before the data of its tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in table.items():
        start = end
        end += tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text


def data_of(tensor: Tensor) -> memoryview:
    """The tensor's data as a buffer. A tensor on the CPU is not copied."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
