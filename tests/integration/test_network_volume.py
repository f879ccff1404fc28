"""Delta versions over a network file system (sshfs): trainer and generators are hosts with a mount each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from anyio.from_thread import start_blocking_portal
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from support.delta_versions import Generators, Replica, Trainer
from support.models import make_tiny_model
from support.slow_volume import missing, mounted
from tandem_protocol.chains import is_complete
from tandem_protocol.config.trainer import PublishConfig
from tandem_protocol.errors import WeightsNotVisible
from tandem_protocol.messages import ServedWeights, SetWeights
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer.learner.shards import model_tensors
from tandem_trainer.publish import Publisher, fingerprint_of

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no network volume: {missing()}")

BYTES_PER_S = 1e8
LISTED_S = 4


@contextmanager
def stores(folder: Path, *, listed_s: int = 0) -> Iterator[tuple[WeightStore, WeightStore]]:
    """The same store as the trainer's host and the generators' host see it."""
    (folder / "backing").mkdir()
    points = folder / "trainer", folder / "generators"
    with mounted(folder / "backing", points, BYTES_PER_S, listed_s=listed_s):
        written, seen = (WeightStore(point / "weights") for point in points)
        yield written, seen


def test_deltas_that_another_host_has_written_are_made_and_served(tmp_path: Path) -> None:
    with stores(tmp_path) as (written, seen):
        trainer = Trainer(written)
        replica, late = (Replica(seen, tmp_path / name) for name in ("local", "late"))
        for manifest, digest in trainer.steps(4):
            assert trainer.is_right(replica.switch(manifest, digest), manifest.version)
            tensors = {name: tensor for file in replica.files for name, tensor in load_file(file).items()}  # it maps
            assert tensors.keys() == {tensor.name for tensor in manifest.tensors}
        assert trainer.is_right(late.switch(manifest, digest), manifest.version)
        assert not any(file.is_relative_to(seen.root) for file in late.files)


class Remote(Generators):
    """Waits for a version that its host does not see yet, as a generator does."""

    async def set_weights(self, version: Version, weights: SetWeights, timeout_s: float) -> dict[str, ServedWeights]:
        while True:
            try:
                return await super().set_weights(version, weights, timeout_s)
            except WeightsNotVisible:
                self.asked.pop()
                await asyncio.sleep(0.1)


def test_complete_files_are_served_although_the_generators_host_lists_an_old_folder(tmp_path: Path) -> None:
    model_dir = make_tiny_model(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(model_dir)
    with (
        stores(tmp_path, listed_s=LISTED_S) as (written, seen),
        written.writer("test"),
        start_blocking_portal() as portal,
    ):
        generators = Remote(seen, tmp_path / "local")
        client: Any = generators
        publish = Publisher(
            store=written, client=client, portal=portal, wait=lambda task: task and task.result(60),
            config=PublishConfig(delta="always"), run_name="r", attempt=1, dtype=torch.bfloat16,
            model_fingerprint=fingerprint_of(model, model_dir), accelerator=Accelerator(cpu=True),
        )  # fmt: skip
        for step in range(2):
            publish(model, step)
            model.get_input_embeddings().weight.data[step] += 1.0
        generators.join("late")
        for file in (tmp_path / "backing/weights/versions/000000.1").glob("*.safetensors"):
            file.write_bytes(
                bytes(file.stat().st_size)
            )  # so it can make nothing, and has listed the folder when it says so
        generators.asked.clear()
        version = publish(model, 2)
        assert len(generators.asked) > 2, "it has refused the complete files, too, because it did not see them"
        assert is_complete(written, written.read(version)[0])
        served, expected = generators.tensors("late"), dict(model_tensors(model, torch.bfloat16))
        assert all(torch.equal(served[name], expected[name]) for name in expected)
