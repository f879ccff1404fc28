"""Test before the first step that checkpoints, exports and versions can be written."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.folders import TEMPORARY
from tandem_rollout.errors import UserError

from ..volumes import how_to_enlarge, in_words
from .lora import adapter_table, save_adapter_config
from .model_files import ModelFiles
from .safetensors_file import DTYPES
from .shards import model_table

log = logging.getLogger(__name__)

MOMENTS_BYTES = {"adamw": 8, "adamw_8bit": 2}
"""Bytes of optimizer state per trained parameter."""


class TooLittleSpace(UserError):
    """A volume has no room for what the run will write."""


def rehearse(
    model: PreTrainedModel, files: ModelFiles, shared: SharedConfig, config: TrainerConfig, *, resumes: bool
) -> None:
    """Write all files except weights into the run's folder, and check that there is space for the weights.

    Args:
        resumes: the run has a checkpoint. Then a full disk is not an error: the run tries again later.

    Raises:
        UserError: says what cannot be written, and why.
    """
    _check_dtypes(model)
    version_bytes = _size_bytes(_table(model, config, getattr(torch, config.learner.dtype)))
    enlarge = how_to_enlarge(version_bytes, config.publish.keep)
    _check_space(shared.weights_dir, "a published version", version_bytes, enlarge)
    try:
        needs_bytes = checkpoint_bytes(model, config)
        _check_space(config.run_dir, "a checkpoint", needs_bytes, "free space there, or choose another volume")
        with TemporaryDirectory(prefix=".rehearsal-", dir=config.run_dir) as folder:
            files.copy_to(Path(folder), adapter=config.lora is not None)
            if config.lora:
                save_adapter_config(model, Path(folder))
    except (TooLittleSpace, OSError) as error:
        if not resumes or (isinstance(error, OSError) and error.errno not in TEMPORARY):
            raise
        log.warning("%s The run continues from its last checkpoint.", error)


def checkpoint_bytes(model: PreTrainedModel, config: TrainerConfig) -> int:
    """About how many bytes a checkpoint has."""
    moments_bytes: int = MOMENTS_BYTES[config.optim.name] * sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    return _size_bytes(_table(model, config, torch.float32)) + moments_bytes


def _table(model: PreTrainedModel, config: TrainerConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return adapter_table(model, dtype) if config.lora else model_table(model, dtype)


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


def _check_space(folder: Path, what: str, needs_bytes: int, fix: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error}. Fix: choose a folder that the trainer may write to."
        ) from error
    if free_bytes < needs_bytes:
        raise TooLittleSpace(
            f"{folder} has {in_words(free_bytes)} free, but {what} needs {in_words(needs_bytes)}. Fix: {fix}."
        )
