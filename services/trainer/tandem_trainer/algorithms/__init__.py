"""Algorithms: from scored groups to a batch, from logprobs to a loss. Pure functions of their arguments, no I/O."""

from __future__ import annotations

from ..config import TrainerConfig
from .base import Algorithm
from .grpo import Grpo


def build(config: TrainerConfig) -> Algorithm:
    """The algorithm that `trainer.algorithm` names."""
    return {"grpo": Grpo}[config.algorithm](config)
