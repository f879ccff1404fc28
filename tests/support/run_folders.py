"""A run's folder without a model: groups, and stand-ins for the learner and the rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from support.rollouts import completion, scored
from tandem_protocol.config.rollout import RewardConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_rollout.pool import Counts
from tandem_trainer.run.run import Run

GROUPS = [
    scored([4], [completion([5, 6], version=Version(2, 1)), completion([7], finish="length")], [1.0, 0.5], row=3),
    scored([4], [completion([8], version=Version(2, 1)), completion([9], version=Version(1, 1))], [None, 0.0], row=4),
]


class Saved:
    """Stands in for learner and rollouts. It writes a file when it is saved, and remembers that it was loaded."""

    loaded = False
    completed_updates: int | None = 3
    trained = None
    checkpoint_bytes = 1000

    def save(self, directory: Path) -> None:
        (directory / "saved").touch()

    def load(self, directory: Path) -> None:
        self.loaded = (directory / "saved").exists()

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int], **again: bool) -> None:
        self.again = again

    def start(self, first_version: Version) -> None: ...

    def learned(self) -> Counts:
        return Counts()


class Unsaved(Saved):
    """Cannot be saved while `error` is set."""

    error: Exception | None = ValueError("the generation config is invalid")

    def save(self, directory: Path) -> None:
        if self.error:
            (directory / "half").write_bytes(bytes(1000))
            raise self.error
        super().save(directory)


ROUTINE = {"checkpoint", "evaluation", "resumed"}
"""Kinds of events that every run has."""
IDENTITY = {"shared.model": "m", "the number of prompts": 4}


def make_run(
    folder: Path, attempts: tuple[int, ...] = (), identity: dict[str, object] = IDENTITY, **options: Any
) -> Run:
    rewards = (RewardConfig(function="rewards:r"),)
    config = TrainerConfig.model_validate({"output_dir": folder, "max_steps": 9, "rewards": rewards} | options)
    run = Run(config, Accelerator(cpu=True), WeightStore(folder / "weights"))
    run.identify(identity, attempts)
    return run


def events(folder: Path) -> list[tuple[str, int]]:
    """Kind and step of each line of `events.jsonl` that is not ROUTINE."""
    return [(event["kind"], event["step"]) for event in all_events(folder) if event["kind"] not in ROUTINE]


def all_events(folder: Path) -> list[dict[str, Any]]:
    file = folder / "default" / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]
