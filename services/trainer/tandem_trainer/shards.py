"""The model as safetensors files, one a rank: which tensors there are, who writes which, and writing one at a time.

However the parameters are spread over ranks, a rank holds no more than its part of them and two whole tensors: one that
is being gathered and one that is being written.
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
"""What can be written, by its name in safetensors files."""


def model_tensors(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors under their names in Hugging Face checkpoints, without those tied to another one, in `dtype`.

    Every rank iterates at the same time, because sharded parameters are gathered here, one after the other; a model
    whose checkpoints make one tensor of several parameters is gathered at once.
    """
    return _named(model, own_tensors(model), dtype)


def model_table(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same names in the same order with tensors that have a dtype and a shape but no data."""
    return dict(_named(model, on_meta(own_tensors(model)), dtype))


def model_shapes(model: PreTrainedModel) -> Shapes:
    """The same names with their shapes."""
    return {name: tuple(tensor.shape) for name, tensor in model_table(model, torch.float32).items()}


def on_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}


def _named(model: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    dtypes = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in state.items()}

    def itemsize(name: str) -> int:
        return dtypes[name].itemsize

    # Wide elements first: then each tensor of a file begins at a multiple of its element's size.
    wide_first = sorted(state, key=itemsize, reverse=True)
    for _, names in groupby(wide_first, str if _is_separable(model, state) else itemsize):
        yield from revert_weight_conversion(
            model, {name: gather(state[name].to(dtypes[name])) for name in names}
        ).items()


def _is_separable(model: PreTrainedModel, state: Mapping[str, Tensor]) -> bool:
    """Whether each parameter alone tells its tensors in a checkpoint."""
    meta = on_meta(state)
    apart = [pair for name in meta for pair in revert_weight_conversion(model, {name: meta[name]}).items()]
    together = revert_weight_conversion(model, meta)
    return {name: tensor.shape for name, tensor in apart} == {name: tensor.shape for name, tensor in together.items()}


def gather(tensor: Tensor) -> Tensor:
    """Gathered from all ranks, if each has a part of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_part(
    directory: Path, table: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], *, rank: int, ranks: int
) -> dict[str, str]:
    """Write this rank's part of `tensors`, whose table is `table`, and bring it to disk; all ranks at the same time.

    Returns:
        File name → digest; empty when there are more ranks than tensors.

    Raises:
        OSError: such as ENOSPC when the volume is full.
    """
    mine = partition(table, ranks)[rank]
    part = (tensor for name, tensor in tensors if name in mine)
    file = f"model-{rank + 1:05d}-of-{ranks:05d}.safetensors"
    try:
        return {file: write_safetensors(directory / file, mine, part)} if mine else {}
    finally:
        for _ in part:  # the others cannot gather without this rank, even if its disk is full
            pass


def partition(table: Mapping[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """The part of each rank: about as many bytes each, in the order of `table`."""
    owners: dict[str, int] = {}
    load_bytes = [0] * ranks
    for name in sorted(table, key=lambda name: table[name].nbytes, reverse=True):
        owners[name] = load_bytes.index(min(load_bytes))
        load_bytes[owners[name]] += table[name].nbytes
    return [{name: tensor for name, tensor in table.items() if owners[name] == rank} for rank in range(ranks)]


def write_safetensors(path: Path, table: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> str:
    """Write `tensors`, which come in the order of `table`, and bring them to disk; returns the file's digest.

    safetensors' own `save_file` wants all tensors of a file in memory, and the digest would be another pass over them.
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
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> Any:
    """A buffer; without a copy where the tensor is on the CPU."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
