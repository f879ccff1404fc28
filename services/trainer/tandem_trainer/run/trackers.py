"""Send a run's metrics to TensorBoard, Weights & Biases or trackio, through accelerate. By default none is used."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import Accelerator

from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.errors import UserError

PROJECT = "tandem"


def check_installed(config: TrainerConfig) -> None:
    """Refuse trackers whose package is not installed, which accelerate would silently ignore.

    Raises:
        UserError: a package is missing. The message names it.
    """
    if missing := [name for name in config.trackers if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"trainer.trackers names {', '.join(missing)}, which is not installed. Fix: pip install "
            f"{' '.join(missing)} in the trainer's environment, or remove it from trainer.trackers."
        )


def start(accelerator: Accelerator, config: TrainerConfig) -> None:
    """Start a tracked run with the run's name."""
    if config.trackers:
        wandb = {"name": config.run_name, "dir": str(config.run_dir)}
        accelerator.init_trackers(PROJECT, init_kwargs={"wandb": wandb, "trackio": {"name": config.run_name}})


def finish(accelerator: Accelerator) -> None:
    """Let every tracker write what it has not written yet."""
    for tracker in accelerator.trackers:
        tracker.finish()


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record. Those of nested objects get names such as `rewards/rewards:exact_match`."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{prefix}{name}", float(value)
