"""The optimizer (AdamW) and its learning rate schedule, made from the configuration."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from tandem_protocol.config.learning import OptimConfig
from tandem_rollout.errors import UserError

NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Patterns of parameter names to which no weight decay is applied.

Source: `Trainer.get_decay_parameter_names` of transformers 5, which TRL's trainers use.
"""


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Make the optimizer of the trainable parameters. Biases and norms get no weight decay.

    Raises:
        UserError: the library of `config.name` is not installed.
    """
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(parameter_groups(model, config.weight_decay), **options, fused=True)
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"trainer.optim.name {config.name} needs the package bitsandbytes, which cannot be imported: {error}. Fix: "
            "install it in the trainer's environment, or use adamw."
        ) from error
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        parameter_groups(model, config.weight_decay), **options
    )
    return optimizer


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into a group with `weight_decay` and one without. Empty groups are left out."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Schedule:
    """The learning rate, which depends only on the number of updates and the configuration.

    A checkpoint therefore holds only that number. A resumed run follows the configuration that it is started with.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimConfig, *, max_steps: int) -> None:
        self._scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=max_steps,
        )

    @property
    def updates(self) -> int:
        """Number of updates so far."""
        return int(self._scheduler.last_epoch)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return float(self._scheduler.get_last_lr()[0])

    def advance(self) -> None:
        """Count an update."""
        self._scheduler.step()

    def resume(self, updates: int) -> None:
        """Set the number of updates so far, when a run is resumed."""
        if updates:
            position = {"last_epoch": updates - 1, "_step_count": updates + 1}
            self._scheduler.load_state_dict({**self._scheduler.state_dict(), **position})
            self._scheduler.step()
