"""Test before the first step that checkpoints, exports and versions can be written."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.errors import UserError

from .lora import adapter_table, save_adapter_config
from .model_files import ModelFiles
from .shards import DTYPES, model_table

MOMENTS_BYTES = {"adamw": 8, "adamw_8bit": 2}
"""Bytes of optimizer state per trained parameter."""


def rehearse(model: PreTrainedModel, files: ModelFiles, shared: SharedConfig, config: TrainerConfig) -> None:
    """Write all files except weights into the run's folder, and check that there is space for the weights.

    Raises:
        UserError: says what cannot be written, and why.
    """
    _check_dtypes(model)
    table = adapter_table if config.lora else model_table
    moments_bytes = MOMENTS_BYTES[config.optim.name] * sum(p.numel() for p in model.parameters() if p.requires_grad)
    _check_space(config.run_dir, "a checkpoint", _size_bytes(table(model, torch.float32)) + moments_bytes)
    version_bytes = _size_bytes(table(model, getattr(torch, config.learner.dtype)))
    _check_space(shared.weights_dir, "a published version", version_bytes)
    with TemporaryDirectory(prefix=".rehearsal-", dir=config.run_dir) as folder:
        files.copy_to(Path(folder), adapter=config.lora is not None)
        if config.lora:
            save_adapter_config(model, Path(folder))


def _check_dtypes(model: PreTrainedModel) -> None:
    table = model_table(model, torch.float32)
    if unsupported := [name for name, tensor in table.items() if tensor.dtype not in DTYPES]:
        name = unsupported[0]
        raise UserError(
            f"{name} of {type(model).__name__} has the dtype {table[name].dtype}, which safetensors files cannot "
            f"hold, expected one of {', '.join(map(str, DTYPES))}. Fix: choose another model."
        )


def _size_bytes(table: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in table.values())


def _check_space(folder: Path, what: str, needs_bytes: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error}. Fix: choose a folder that the trainer may write to."
        ) from error
    if free_bytes < needs_bytes:
        raise UserError(
            f"{folder} has {free_bytes / 1e9:.2f} GB free, but {what} needs {needs_bytes / 1e9:.2f} GB. Fix: free "
            "space there, or put the folder on another volume."
        )
