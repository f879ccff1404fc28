"""What a checkpoint has of the learner: the model or its adapter, the optimizer's state, and the counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers import PreTrainedModel

from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig

from ..ranks import do_together
from .lora import load_adapter, write_adapter
from .model_files import ModelFiles
from .optimizer import Schedule
from .parallel import is_sharded, load_optimizer, load_weights, save_index, save_optimizer, save_part
from .save_rehearsal import checkpoint_bytes, rehearse

MODEL_DIR = "model"
STATE_FILE = "learner.pt"


class Saver:
    """Writes and reads the learner's part of a checkpoint. Every rank calls every method at the same time."""

    def __init__(
        self,
        config: TrainerConfig,
        shared: SharedConfig,
        accelerator: Accelerator,
        model: PreTrainedModel,
        files: ModelFiles,
        optimizer: AcceleratedOptimizer,
        schedule: Schedule,
    ) -> None:
        self._config = config
        self._shared = shared
        self._accelerator = accelerator
        self._model = model
        self._files = files
        self._optimizer = optimizer
        self._schedule = schedule

    @property
    def checkpoint_bytes(self) -> int:
        """About how many bytes a checkpoint needs on disk."""
        return checkpoint_bytes(self._model, self._config)

    def rehearse(self, *, resumes: bool) -> None:
        """Test that the model can be saved, exported and published.

        Args:
            resumes: the run has a checkpoint. Then a full disk is not an error: the run tries again later.

        Raises:
            UserError: says what cannot be saved, and why.
        """
        if self._accelerator.is_main_process:
            rehearse(self._model, self._files, self._shared, self._config, resumes=resumes)

    def save(self, directory: Path) -> None:
        """Write the checkpoint's part.

        Raises:
            PartFailed: on every rank, for instance when the disk is full.
        """
        do_together(
            self._accelerator,
            partial(self._save_model, directory / MODEL_DIR),
            partial(save_optimizer, self._model, self._optimizer.optimizer, directory),
            partial(self._save_rest, directory),
        )

    def _save_model(self, directory: Path) -> None:
        if self._config.lora:
            write_adapter(self._model, directory, torch.float32, is_main=self._accelerator.is_main_process)
        else:
            save_part(self._model, directory, self._accelerator)

    def _save_rest(self, directory: Path) -> None:
        """Write what only the main process writes: the index of the weights, the model's other files, the counts."""
        if not self._accelerator.is_main_process:
            return
        model_dir = directory / MODEL_DIR
        if not self._config.lora:
            save_index(model_dir)
        self._files.copy_to(model_dir, adapter=self._config.lora is not None)
        state = {"updates": self._schedule.updates, "rng": torch.get_rng_state()}
        try:
            torch.save(state, directory / STATE_FILE)
        except RuntimeError as error:  # torch raises it when the disk is full
            raise OSError(f"{directory / STATE_FILE} cannot be written: {error}") from error

    def load(self, directory: Path, load_model: Callable[[Path], PreTrainedModel]) -> None:
        """Load what `save` wrote: weights, moments and counts."""
        if self._config.lora:
            load_adapter(self._model, directory / MODEL_DIR)
        else:
            weights = load_model(directory / MODEL_DIR).state_dict()
            load_weights(self._model, weights, from_main=is_sharded(self._config.learner, self._accelerator))
        state = torch.load(directory / STATE_FILE, weights_only=True, map_location="cpu")
        if state["updates"]:  # before the first update there are no moments
            load_optimizer(self._model, self._optimizer.optimizer, directory)
        self._schedule.resume(state["updates"])
        torch.set_rng_state(state["rng"])
