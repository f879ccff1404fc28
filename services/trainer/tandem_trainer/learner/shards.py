"""Write the model as safetensors files, one per rank, tensor by tensor.

If the parameters are sharded, a rank holds only its part and at most two complete tensors: one that is being gathered
and one that is being written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tandem_protocol.manifest import Digest
from tandem_protocol.parameters import Shapes, own_tensors

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The dtypes that can be written → their names in safetensors files."""


def model_tensors(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's complete tensors in `dtype`, under their names in Hugging Face checkpoints.

    Of tied tensors only one is included. Every rank iterates at the same time, because sharded parameters are gathered
    here, one after the other. If the checkpoint combines several parameters into one tensor, the model is gathered at
    once.
    """
    return _named(model, own_tensors(model), dtype)


def model_table(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `model_tensors` in the same order. They have a dtype and a shape, but no data."""
    return dict(_named(model, on_meta(own_tensors(model)), dtype))


def model_shapes(model: PreTrainedModel) -> Shapes:
    """The names and shapes of `model_tensors`."""
    return {name: tuple(tensor.shape) for name, tensor in model_table(model, torch.float32).items()}


def on_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace tensors by ones that have a dtype and a shape, but no data."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}


def _named(model: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    dtypes = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in state.items()}

    def itemsize(name: str) -> int:
        return dtypes[name].itemsize

    # Wide dtypes come first, so that each tensor of a file starts at a multiple of its element's size.
    wide_first = sorted(state, key=itemsize, reverse=True)
    for _, names in groupby(wide_first, str if _is_separable(model, state) else itemsize):
        yield from revert_weight_conversion(
            model, {name: gather(state[name].to(dtypes[name])) for name in names}
        ).items()


def _is_separable(model: PreTrainedModel, state: Mapping[str, Tensor]) -> bool:
    """True if each parameter can be converted to checkpoint tensors on its own."""
    meta = on_meta(state)
    separate = [pair for name in meta for pair in revert_weight_conversion(model, {name: meta[name]}).items()]
    separate_shapes = {name: tensor.shape for name, tensor in separate}
    joint_shapes = {name: tensor.shape for name, tensor in revert_weight_conversion(model, meta).items()}
    return separate_shapes == joint_shapes


def gather(tensor: Tensor) -> Tensor:
    """Return the complete tensor. A sharded one is gathered, so every rank calls this at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_part(
    directory: Path, table: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], *, rank: int, ranks: int
) -> dict[str, str]:
    """Write this rank's part of `tensors` and flush it to disk. Every rank calls it at the same time.

    Args:
        table: `model_table`, with the same names as `tensors`.

    Returns:
        File name → digest; empty if there are more ranks than tensors and this one writes none.

    Raises:
        OSError: such as ENOSPC when the volume is full.
    """
    mine = partition(table, ranks)[rank]
    part = (tensor for name, tensor in tensors if name in mine)
    file = f"model-{rank + 1:05d}-of-{ranks:05d}.safetensors"
    try:
        return {file: write_safetensors(directory / file, mine, part)} if mine else {}
    finally:
        for _ in part:  # gathering needs all ranks, even if the disk of one is full
            pass


def partition(table: Mapping[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """Divide `table` into one part per rank with about the same number of bytes each, keeping the order."""
    owners: dict[str, int] = {}
    load_bytes = [0] * ranks
    for name in sorted(table, key=lambda name: table[name].nbytes, reverse=True):
        owners[name] = load_bytes.index(min(load_bytes))
        load_bytes[owners[name]] += table[name].nbytes
    return [{name: tensor for name, tensor in table.items() if owners[name] == rank} for rank in range(ranks)]


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
