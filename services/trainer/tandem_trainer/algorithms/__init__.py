"""Algorithms: they turn groups of trajectories into a batch, and logprobs into a loss. Pure functions without I/O."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tandem_protocol.config.names import is_of_project
from tandem_protocol.config.trainer import TrainerConfig

from ..batch import Batch, pad, rows_of
from .base import Algorithm, Gather, Mean, MicroBatchLoss, StepTotals
from .grpo import Grpo
from .online_dpo import OnlineDpo
from .project_algorithm import ProjectAlgorithm
from .rehearsal import rehearse
from .tokens import Pairs, Tokens

__all__ = [
    "Algorithm", "Batch", "Gather", "Grpo", "Mean", "MicroBatchLoss", "OnlineDpo", "Pairs", "StepTotals", "Tokens",
    "build", "load", "pad", "rows_of",
]  # fmt: skip

ALGORITHMS: dict[str, Callable[[TrainerConfig], Algorithm]] = {"grpo": Grpo, "online_dpo": OnlineDpo}


def build(config: TrainerConfig) -> Algorithm:
    """Return the algorithm that `trainer.algorithm` names.

    Raises:
        UserError: something of the project cannot be imported or called.
    """
    if is_of_project(config.algorithm):
        return ProjectAlgorithm(config)
    return ALGORITHMS[config.algorithm](config)


def load(config: TrainerConfig, device: torch.device) -> Algorithm:
    """Return the algorithm that `trainer.algorithm` names, tried out on a few tokens.

    Raises:
        UserError: something of the project cannot be imported or called, or its loss is wrong.
    """
    algorithm = build(config)
    rehearse(algorithm, config, device)
    return algorithm
