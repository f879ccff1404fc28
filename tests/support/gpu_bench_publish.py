"""Cases of tests/bench/gpu.py: publishing from the GPU to a volume in memory, and the copies that bound it."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from support import gpu
from support.gpu_publish import mock_missing, publisher
from support.gpu_updates import config_of
from support.shapes import make_model, write_config
from tandem_trainer.learner.shards import model_table, model_tensors
from tandem_trainer.publish import Publisher

DTYPE = torch.bfloat16
BUFFER_BYTES = 1 << 28
ROUNDS, ROUNDS_OF_LARGE = 3, 1
LARGE_BYTES = 10 << 30
COPIES = 2.2
"""The folder holds one complete version and the next one, each with its header."""


def speeds() -> dict[str, float]:
    """Speeds of the machine: a matrix product, a copy on the card, and copies to the host."""
    device, on_card = gpu.device(), torch.accelerator.is_available()
    size = 8192 if on_card else 256
    square = torch.randn(size, size, device=device).bfloat16()
    product_s = _best(lambda: square @ square)
    source = torch.empty(BUFFER_BYTES if on_card else 1 << 20, dtype=torch.uint8, device=device)
    pinned = torch.empty(source.shape, dtype=torch.uint8, pin_memory=on_card)
    return {
        "matmul_TFLOP_per_s": 2 * size**3 / product_s / 1e12,
        "on_card_copy_GB_per_s": 2 * source.nbytes / _best(source.clone) / 1e9,
        "to_host_GB_per_s": source.nbytes / _best(source.cpu) / 1e9,
        "to_pinned_host_GB_per_s": source.nbytes / _best(lambda: pinned.copy_(source)) / 1e9,
    }


def new_model(shape: str, folder: Path) -> tuple[PreTrainedModel, Path, int]:
    """Return a model on the GPU, the folder with its configuration, and the bytes of a version."""
    gpu.reset_peak()  # frees what earlier cases have left
    config_dir = write_config(shape, folder / "model")
    torch.manual_seed(0)
    model = make_model(shape, gpu.device())
    return model, config_dir, sum(tensor.nbytes for tensor in model_table(model, DTYPE).values())


def no_space(folder: Path, needed: float) -> str | None:
    """Say that a folder has less space than `needed` bytes. None: it has enough."""
    free = shutil.disk_usage(folder).free
    return f"{folder} has {free / 1e9:.0f} GB free, expected {needed / 1e9:.0f} GB" if free < needed else None


def cases(shapes: list[str], folder: Path) -> list[tuple[str, Callable[[], dict[str, object]]]]:
    return [(f"publish {shape}", partial(_measure, shape, folder / f"publish-{shape}")) for shape in shapes]


def _measure(shape: str, folder: Path) -> dict[str, object]:
    """Publish some versions, waiting for them and behind other work, and copy and write the same bytes plainly."""
    model, config_dir, size = new_model(shape, folder)
    if why := no_space(folder, COPIES * size):
        return {"skipped": why}
    without_mock = mock_missing()
    buffer = memoryview(torch.randint(0, 255, (min(size, BUFFER_BYTES),), dtype=torch.uint8).numpy().data)
    rounds = Rounds(model)
    config = config_of(learner={"dtype": "bfloat16"})
    with (
        gpu.accelerator(config) as accelerator,
        publisher(
            model, config_dir, folder, accelerator, dtype=DTYPE, mock=not without_mock, report=rounds.reported
        ) as (publish, _),
    ):
        rounds.publish("first", publish)
        for _ in range(ROUNDS if size < LARGE_BYTES else ROUNDS_OF_LARGE):
            rounds.seconds["plain_write"].append(_write_plainly(buffer, size, folder / "plain"))
            rounds.seconds["plain_copy"].append(gpu.timed(lambda: _copy_plainly(model)))
            rounds.publish("", publish)
            rounds.publish("behind", publish)
    shutil.rmtree(folder)
    return _figures(size, rounds.seconds) | {"generator": f"none: {without_mock}" if without_mock else "mock"}


class Rounds:
    """The seconds of the phases of each publish, as the trainer measures them, by kind of publish."""

    def __init__(self, model: Any) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.sizes: dict[str, list[int]] = defaultdict(list)
        """Kind → the bytes that were written, of each publish."""
        self._model = model
        self._kind = ""
        self._step = 0

    def reported(self, timings: dict[str, float], size: int) -> None:
        self.sizes[self._kind].append(size)
        for phase, value in timings.items():
            self.seconds[f"{self._kind} {phase.removesuffix('_s')}".strip()].append(value)

    def publish(self, kind: str, publish: Publisher) -> None:
        """Publish a version. With the kind "behind", also measure how long the learner waits for it."""
        self._kind, self._step = kind, self._step + 1
        gpu.synchronize()
        began = time.perf_counter()
        publish(self._model, self._step, behind=kind == "behind")
        if kind == "behind":
            self.seconds["behind learner_waits"].append(time.perf_counter() - began)
        publish.wait()


def _figures(size: int, seconds: dict[str, list[float]]) -> dict[str, object]:
    """GB/s of the complete publish and of its parts, and the seconds of each. All are medians."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    served = sum(median[name] for name in ("visible", "verify", "pause", "load"))
    written = median["total"] - served
    copies = [median[f"{kind}gather"] + median[f"{kind}copy"] for kind in ("", "behind ")]
    return {
        "bytes": size,
        "publish_GB_per_s": size / median["total"] / 1e9,
        "until_commit_GB_per_s": size / written / 1e9,
        "copy_GB_per_s": size / copies[0] / 1e9,
        "copy_behind_GB_per_s": size / copies[1] / 1e9,
        "plain_write_GB_per_s": size / median["plain_write"] / 1e9,
        "plain_copy_GB_per_s": size / median["plain_copy"] / 1e9,
        "until_commit_per_plain_copy_and_write": written / (median["plain_copy"] + median["plain_write"]),
        "make_host_memory_s": median["first copy"] - median["copy"],
        **{f"{name.replace(' ', '_')}_s": value for name, value in median.items()},
    }


def _copy_plainly(model: Any) -> None:
    for _, tensor in model_tensors(model, DTYPE):
        tensor.cpu()


def _write_plainly(buffer: memoryview, size: int, path: Path) -> float:
    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for start in range(0, size, len(buffer)):
                file.write(buffer[: size - start])
            os.fsync(file.fileno())

    seconds = gpu.timed(write)
    path.unlink()
    return seconds


def _best(action: Callable[[], object], rounds: int = 5) -> float:
    return min(gpu.timed(action) for _ in range(rounds))
