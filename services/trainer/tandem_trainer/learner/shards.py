"""Write the model as safetensors files, one or more per rank, tensor by tensor.

If the parameters are sharded, a rank holds only its part and few complete tensors: one that is being gathered, and at
least one that is being written (`write_files`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tandem_protocol.parameters import Shapes, own_tensors

from .safetensors_file import write_files

MAX_FILES = 8
"""The most files of a version that a rank writes at the same time, each in a thread of its own."""
MIN_FILE_BYTES = 32 << 20
"""Smaller files are not worth a thread."""

_CORRECTION = re.compile(r"\.(e_score_correction_bias|expert_bias)$")
"""What a mixture of experts adds to the scores of its experts. Rounding it would choose other experts."""


class _Conversion(NamedTuple):
    """How the parameters of a model become tensors of a checkpoint."""

    shapes: Mapping[str, torch.Size]
    """The shapes of the parameters for which this was found out."""
    is_separable: bool
    """Whether each parameter can be converted on its own."""
    names: Mapping[str, str] | None
    """Name of a parameter → its name in a checkpoint, if nothing but names changes."""


_conversions: WeakKeyDictionary[PreTrainedModel, _Conversion] = WeakKeyDictionary()
"""What was found out about each model."""


def model_tensors(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's complete tensors in `dtype`, under their names in Hugging Face checkpoints.

    Float buffers, and parameters that transformers always keeps in float32, have float32 instead. Of tied tensors only
    one is included. Every rank iterates at the same time, because sharded parameters are gathered here, one after the
    other. If the checkpoint combines several parameters into one tensor, the model is gathered at once.
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
    dtypes = _dtypes(model, state, dtype)

    def itemsize(name: str) -> int:
        return dtypes[name].itemsize

    # Wide dtypes come first, so that each tensor of a file starts at a multiple of its element's size.
    wide_first = sorted(state, key=itemsize, reverse=True)
    conversion = _conversion(model, state)
    if conversion.names is not None:
        for name in wide_first:
            yield conversion.names[name], gather(state[name].to(dtypes[name]))
        return
    for _, names in groupby(wide_first, str if conversion.is_separable else itemsize):
        yield from revert_weight_conversion(
            model, {name: gather(state[name].to(dtypes[name])) for name in names}
        ).items()


def _dtypes(model: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, torch.dtype]:
    exact = {name for name, _ in model.named_buffers()}
    parts = [f".{part}." for part in model._keep_in_fp32_modules_strict or ()]

    def of(name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        is_exact = name in exact or _CORRECTION.search(name) or any(part in f".{name}." for part in parts)
        return torch.float32 if is_exact else dtype

    return {name: of(name, tensor) for name, tensor in state.items()}


def _conversion(model: PreTrainedModel, state: Mapping[str, Tensor]) -> _Conversion:
    """Find out how to convert `state`. That takes up to 0.3 s for 270 tensors, so the answer is kept."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    known = _conversions.get(model)
    if known is None or known.shapes != shapes:
        known = _conversions[model] = _Conversion(shapes, *_tried(model, on_meta(state)))
    return known


def _tried(model: PreTrainedModel, meta: dict[str, Tensor]) -> tuple[bool, dict[str, str] | None]:
    separate = {name: revert_weight_conversion(model, {name: tensor}) for name, tensor in meta.items()}
    separate_shapes = {name: tensor.shape for one in separate.values() for name, tensor in one.items()}
    joint_shapes = {name: tensor.shape for name, tensor in revert_weight_conversion(model, meta).items()}
    if separate_shapes != joint_shapes:
        return False, None
    # If a tensor comes back as the same object, no operation was applied to it.
    is_kept = all(list(map(id, one.values())) == [id(meta[name])] for name, one in separate.items())
    return True, {name: next(iter(one)) for name, one in separate.items()} if is_kept else None


def gather(tensor: Tensor) -> Tensor:
    """Return the complete tensor. A sharded one is gathered, so every rank calls this at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_part(
    directory: Path,
    table: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    rank: int,
    ranks: int,
    max_files: int = 1,
) -> dict[str, str]:
    """Write this rank's part of `tensors` and flush it to disk. Every rank calls it at the same time.

    Args:
        table: `model_table`, with the same names as `tensors`.
        max_files: see `part_files`.

    Returns:
        File name → digest; empty if there are more ranks than tensors and this one writes none.

    Raises:
        OSError: such as ENOSPC when the volume is full.
    """
    return write_files(directory, part_files(table, rank=rank, ranks=ranks, max_files=max_files), tensors)


def part_files(
    table: Mapping[str, Tensor], *, rank: int, ranks: int, max_files: int = MAX_FILES
) -> dict[str, dict[str, Tensor]]:
    """Return the files that a rank writes, and the table of each. There are none if there are too few tensors.

    Args:
        max_files: a rank writes up to this many files, unless they would be small. A thread writes each, and a thread
            of a generator verifies it.
    """
    size_bytes = sum(tensor.nbytes for tensor in table.values()) // ranks
    per_rank = max(1, min(max_files, size_bytes // MIN_FILE_BYTES))
    count = ranks * per_rank
    parts = partition(table, count)
    own = range(rank * per_rank, (rank + 1) * per_rank)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": parts[i] for i in own if parts[i]}


def partition(table: Mapping[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """Divide `table` into one part per rank with about the same number of bytes each, keeping the order."""
    owners: dict[str, int] = {}
    load_bytes = [0] * ranks
    for name in sorted(table, key=lambda name: table[name].nbytes, reverse=True):
        owners[name] = load_bytes.index(min(load_bytes))
        load_bytes[owners[name]] += table[name].nbytes
    return [{name: tensor for name, tensor in table.items() if owners[name] == rank} for rank in range(ranks)]
