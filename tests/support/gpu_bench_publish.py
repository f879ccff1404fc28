"""Cases of tests/bench/gpu.py: publishing from the GPU to a volume in memory, and the copies that bound it."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from support import gpu
from support.gpu_publish import mock_missing, publisher
from support.gpu_updates import config_of
from support.shapes import make_model, write_config
from tandem_protocol.store import WeightStore
from tandem_trainer import publish as publish_module
from tandem_trainer.learner import safetensors_file
from tandem_trainer.learner.shards import model_table, model_tensors

DTYPE = torch.bfloat16
BUFFER_BYTES = 1 << 28
ROUNDS, ROUNDS_OF_LARGE = 3, 2
LARGE_BYTES = 10 << 30


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


def cases(shapes: list[str], folder: Path) -> list[tuple[str, Callable[[], dict[str, object]]]]:
    return [(f"publish {shape}", partial(_measure, shape, folder / f"publish-{shape}")) for shape in shapes]


def _measure(shape: str, folder: Path) -> dict[str, object]:
    """Publish some versions, and copy and write the same bytes plainly, in turns."""
    gpu.reset_peak()  # frees what earlier cases have left
    config_dir = write_config(shape, folder / "model")
    torch.manual_seed(0)
    model = make_model(shape, gpu.device())
    size = sum(tensor.nbytes for tensor in model_table(model, DTYPE).values())
    free = shutil.disk_usage(folder).free
    if free < 2.2 * size:
        return {"skipped": f"{folder} has {free / 1e9:.0f} GB free, expected {2.2 * size / 1e9:.0f} GB"}
    without_mock = mock_missing()
    buffer = memoryview(torch.randint(0, 255, (min(size, BUFFER_BYTES),), dtype=torch.uint8).numpy())
    seconds: dict[str, list[float]] = defaultdict(list)
    config = config_of(learner={"dtype": "bfloat16"})
    with (
        gpu.accelerator(config) as accelerator,
        publisher(model, config_dir, folder, accelerator, dtype=DTYPE, mock=not without_mock) as (publish, store),
    ):
        for step in range(ROUNDS if size < LARGE_BYTES else ROUNDS_OF_LARGE):
            seconds["plain_write"].append(_write_plainly(buffer, size, folder / "plain"))
            seconds["plain_copy"].append(gpu.timed(lambda: _copy_plainly(model)))
            with _phases(store) as phases:
                began = time.perf_counter()
                publish(model, step)
                phases["total"] = time.perf_counter() - began
            for name, value in phases.items():
                seconds[name].append(value)
    shutil.rmtree(folder)
    return _figures(size, seconds) | {"generator": f"none: {without_mock}" if without_mock else "mock"}


def _figures(size: int, seconds: dict[str, list[float]]) -> dict[str, object]:
    """GB/s of the complete publish and of its parts, and their seconds. The first round warms up."""
    median = {name: statistics.median(values[1:] or values) for name, values in seconds.items()}
    written = median["total"] - median["serve"]
    return {
        "bytes": size,
        "publish_GB_per_s": size / median["total"] / 1e9,
        "until_commit_GB_per_s": size / written / 1e9,
        "plain_write_GB_per_s": size / median["plain_write"] / 1e9,
        "plain_copy_GB_per_s": size / median["plain_copy"] / 1e9,
        "until_commit_per_plain_copy_and_write": written / (median["plain_copy"] + median["plain_write"]),
        "first_publish_s": seconds["total"][0],
        **{f"{name}_s": value for name, value in median.items()},
    }


@contextmanager
def _phases(store: WeightStore) -> Iterator[dict[str, float]]:
    """Yield the seconds that a publish spends in each of its parts, filled while it runs.

    gather: the cast on the GPU. copy: to the host. digest, write, commit, and serve: until the generator has switched.
    """
    phases: dict[str, float] = defaultdict(float)

    @contextmanager
    def adding(phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        phases[phase] += time.perf_counter() - began

    def gathered(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
        tensors = model_tensors(*arguments)
        while True:
            with adding("gather"):
                item = next(tensors, None)
                gpu.synchronize()
            if item is None:
                return
            yield item

    def around(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            with adding(phase):
                return function(*arguments, **keywords)

        return timed

    class Digest:
        def __init__(self) -> None:
            self._digest = digest()
            self.update, self.hexdigest = around("digest", self._digest.update), self._digest.hexdigest

    digest = safetensors_file.Digest
    commit = WeightStore.commit
    written = around("until_written", publish_module.write_part)
    with (
        mock.patch.object(publish_module, "model_tensors", gathered),
        mock.patch.object(publish_module, "write_part", written),
        mock.patch.object(safetensors_file, "_bytes", around("copy", safetensors_file._bytes)),
        mock.patch.object(safetensors_file, "Digest", Digest),
        mock.patch.object(WeightStore, "commit", lambda *a, **k: around("commit", commit)(*a, **k)),
        mock.patch.object(publish_module.Publisher, "_write", _around_write(around)),
    ):
        yield phases
    phases["write"] = phases.pop("until_written") - phases["gather"] - phases["copy"] - phases["digest"]
    phases["serve"] = phases["total"] - phases.pop("until_commit")


def _around_write(around: Callable[..., Any]) -> Callable[..., Any]:
    write = publish_module.Publisher._write
    return lambda *arguments: around("until_commit", write)(*arguments)


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
