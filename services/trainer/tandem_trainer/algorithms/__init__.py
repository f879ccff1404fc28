"""Algorithms: from scored groups to a batch, from logprobs to a loss. Pure functions of their arguments, no I/O."""

from __future__ import annotations

from collections.abc import Callable

from ..config import TrainerConfig
from .base import Algorithm
from .grpo import Grpo
from .online_dpo import OnlineDpo


def build(config: TrainerConfig) -> Algorithm:
    """The algorithm that `trainer.algorithm` names."""
    algorithms: dict[str, Callable[[TrainerConfig], Algorithm]] = {"grpo": Grpo, "online_dpo": OnlineDpo}
    return algorithms[config.algorithm](config)
