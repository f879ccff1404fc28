# ruff: noqa: ARG002 - the arguments of a callback are transformers'
"""Publish before the first step and after the last, and log the last.

TRL sends weights only before it samples, and logs every few steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from transformers import TrainerCallback

TAKES_WEIGHTS_AS_SENT = SpecifierSet("<0.17")
"""Versions of TRL that do not send the weights before the first step. The generators may have others."""


class LastStep(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """Has TRL log the last step, and publishes its weights."""

    def __init__(self, trainer: Any, release: str) -> None:
        """Make the callback of a trainer of the version `release` of TRL."""
        self._trainer, self._release = trainer, release

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have TRL send the weights before the first step too, unless an evaluation has sent them."""
        if TAKES_WEIGHTS_AS_SENT.contains(self._release, prereleases=True):
            self._trainer._last_loaded_step = -1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the last step, also if it is between two multiples of `logging_steps`."""
        control.should_log |= control.should_training_stop

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Publish the weights, unless an evaluation has done so. All ranks take part.

        With `load_best_model_at_end`, the model has the weights of the best checkpoint by now.
        """
        trainer = self._trainer
        generation = getattr(trainer, "vllm_generation", None)
        send = generation.sync_weights if generation else getattr(trainer, "_move_model_to_vllm", None)
        is_sent = getattr(trainer, "_last_loaded_step", None) == state.global_step
        if send and (not is_sent or goes_back(args, state)):
            send()
            trainer._last_loaded_step = state.global_step


def goes_back(args: Any, state: Any) -> bool:
    """Whether the model has the weights of an earlier checkpoint, because that was the best."""
    best: str | None = state.best_model_checkpoint
    if best is None or not getattr(args, "load_best_model_at_end", False):
        return False
    return Path(best).name != f"checkpoint-{state.global_step}"
