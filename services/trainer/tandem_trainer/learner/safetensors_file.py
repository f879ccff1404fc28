"""Write tensors into a safetensors file, one after the other. This module needs torch only, not transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem_protocol.manifest import Digest

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The dtypes that can be written → their names in safetensors files."""


def write_safetensors(path: Path, table: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> str:
    """Write `tensors`, which have the order of `table`, and flush them to disk. Returns the file's digest.

    safetensors' own `save_file` needs all tensors of a file in memory, and would need a second pass for the digest.

    Source: the format, in the README of huggingface/safetensors.
    """
    digest = Digest()
    with path.open("wb") as file:
        for data in chain[Any]([_header(table)], map(_bytes, tensors)):
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


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


def _bytes(tensor: Tensor) -> Any:
    """The tensor's data as a buffer. A tensor on the CPU is not copied."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
