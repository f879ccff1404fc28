"""Cases of tests/bench/gpu.py: publishing delta versions from the GPU to a volume in memory."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from support import gpu
from support.gpu_bench_publish import DTYPE, Rounds, new_model, no_space
from support.gpu_publish import mock_missing, publisher
from support.gpu_updates import config_of

CHANGED_EVERY = 107
"""One of this many words changes in a step: 0.94 %, as in a run with a learning rate of 5e-6."""
COUNT = 3
COPIES = 4.2
"""The folder holds one complete version, the next one, and two that the generator has made, each with its header."""


def cases(shapes: list[str], folder: Path) -> list[tuple[str, Callable[[], dict[str, object]]]]:
    return [(f"delta {shape}", partial(_measure, shape, folder / f"delta-{shape}")) for shape in shapes]


@torch.no_grad()
def change(model: PreTrainedModel, step: int) -> None:
    """Change some of the words that are published."""
    for parameter in model.parameters():
        parameter.view(-1)[step % CHANGED_EVERY :: CHANGED_EVERY] += 1.0


def _measure(shape: str, folder: Path) -> dict[str, object]:
    """Publish a complete version, and then deltas behind other work."""
    model, config_dir, size = new_model(shape, folder)
    if why := no_space(folder, COPIES * size):
        return {"skipped": why}
    without_mock, rounds = mock_missing(), Rounds(model)
    options: dict[str, Any] = {"dtype": DTYPE, "mock": not without_mock, "report": rounds.reported, "delta": "always"}
    with (
        gpu.accelerator(config_of(learner={"dtype": "bfloat16"})) as accelerator,
        publisher(model, config_dir, folder, accelerator, **options) as (publish, _),
    ):
        rounds.publish("complete", publish)
        for step in range(COUNT):
            change(model, step)
            rounds.publish("behind", publish)
    shutil.rmtree(folder)
    median = {name: statistics.median(values) for name, values in rounds.seconds.items()}
    return {
        "bytes": size,
        "delta_bytes_per_bytes": statistics.median(rounds.sizes["behind"]) / size,
        **{f"{name.replace(' ', '_')}_s": value for name, value in median.items()},
        "generator": f"none: {without_mock}" if without_mock else "mock",
    }
