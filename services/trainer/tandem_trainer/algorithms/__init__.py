"""Algorithms: they turn groups of trajectories into a batch, and logprobs into a loss. Pure functions without I/O."""

from __future__ import annotations

from collections.abc import Callable

from tandem_protocol.config.trainer import TrainerConfig

from .base import Algorithm
from .grpo import Grpo
from .online_dpo import OnlineDpo


def build(config: TrainerConfig) -> Algorithm:
    """Return the algorithm that `trainer.algorithm` names."""
    algorithms: dict[str, Callable[[TrainerConfig], Algorithm]] = {"grpo": Grpo, "online_dpo": OnlineDpo}
    return algorithms[config.algorithm](config)
