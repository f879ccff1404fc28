"""A generator that refuses deltas gets the complete files, also if its side of the volume shows them late."""

from __future__ import annotations

import asyncio
import errno
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from anyio import to_thread
from anyio.from_thread import start_blocking_portal
from transformers import LlamaForCausalLM, PreTrainedModel

from support.delta_versions import Generators
from support.models import make_tiny_model
from tandem_protocol.chains import is_complete
from tandem_protocol.config.trainer import PublishConfig
from tandem_protocol.errors import StoreError, WeightsRefused
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer import publish as publish_module
from tandem_trainer import sending
from tandem_trainer.deltas import Deltas
from tandem_trainer.learner.shards import model_tensors
from tandem_trainer.publish import Publisher, fingerprint_of

TIMEOUT_S = 60.0
V0, V1 = Version(0, 1), Version(1, 1)


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model"))


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path / "weights")


@pytest.fixture
def generators(store: WeightStore, tmp_path: Path) -> Generators:
    return Generators(store, tmp_path / "local")


@pytest.fixture
def publish(
    store: WeightStore, generators: Generators, model: PreTrainedModel, tmp_path: Path
) -> Iterator[Callable[[int], Version]]:
    """Publishes the model, and then changes a few words of it."""
    client: Any = generators
    with store.writer("test"), start_blocking_portal() as portal:
        publisher = Publisher(
            store=store, client=client, portal=portal, wait=lambda task: task and task.result(TIMEOUT_S),
            config=PublishConfig(delta="always"), run_name="r", attempt=1, dtype=torch.bfloat16,
            model_fingerprint=fingerprint_of(model, tmp_path / "model"), accelerator=Accelerator(cpu=True),
        )  # fmt: skip

        def publish(step: int) -> Version:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.view(-1)[step::97] += 1.0
            return publisher(model, step)

        yield publish


def test_complete_files_that_a_generators_volume_shows_late_are_waited_for(
    publish: Callable[[int], Version], generators: Generators, store: WeightStore, model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(publish_module, "VISIBLE_PAUSE_S", 0.0)
    publish(0)
    serve, late = generators.set_weights, [WeightsRefused("a file is missing") for _ in range(4)]

    async def serve_at_last(*arguments: Any) -> Any:
        generators.refuses = late.pop() if late else None
        return await serve(*arguments)

    monkeypatch.setattr(generators, "set_weights", serve_at_last)
    publish(1)
    assert generators.asked == [V0, *[V1] * 5]
    assert is_complete(store, store.read(V1)[0])
    served, expected = generators.tensors(), dict(model_tensors(model, torch.bfloat16))
    assert all(torch.equal(served[name], expected[name]) for name in expected)


def test_a_version_that_vanishes_from_the_store_is_not_waited_for(
    publish: Callable[[int], Version], generators: Generators, store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "LOOK_S", 0.001)
    publish(0)
    left = []

    async def never(version: Version, *_: object) -> None:
        shutil.rmtree(store.directory(version))
        try:
            await asyncio.sleep(TIMEOUT_S)
        finally:
            left.append(version)

    monkeypatch.setattr(generators, "set_weights", never)
    with pytest.raises(StoreError, match=r"version 1\.1 is not in .* any more.*same command again"):
        publish(1)
    assert left == [V1]


def test_a_version_that_vanishes_while_a_generator_reads_it_is_the_reason_that_the_user_learns(
    publish: Callable[[int], Version], generators: Generators, store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(0)

    async def refuse(version: Version, *_: object) -> None:
        shutil.rmtree(store.directory(version))
        raise WeightsRefused("a file is missing")

    monkeypatch.setattr(generators, "set_weights", refuse)
    with pytest.raises(StoreError, match=r"version 1\.1 is not in .* any more.*same command again"):
        publish(1)


@pytest.mark.parametrize("fault", ["hangs", "fails"])
def test_a_volume_that_does_not_answer_ends_neither_a_switch_nor_its_deadline(
    publish: Callable[[int], Version], generators: Generators, store: WeightStore, monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(sending, "LOOK_S", 0.001)
    looked, released = threading.Event(), threading.Event()
    serve = generators.set_weights

    def look(*_: object) -> None:
        looked.set()
        if fault == "hangs":
            released.wait(TIMEOUT_S)
        raise OSError(errno.EIO, "the volume does not answer")

    async def slow(version: Version, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(store, "directory", lambda _: SimpleNamespace(stat=look))
            await to_thread.run_sync(looked.wait, TIMEOUT_S)
            await asyncio.sleep(0.05)  # several looks
        return await serve(version, *arguments)

    monkeypatch.setattr(generators, "set_weights", slow)
    try:
        publish(0)
        assert generators.asked == [V0]
    finally:
        released.set()


def test_complete_files_that_nobody_needs_any_more_are_not_written_to_their_end(
    publish: Callable[[int], Version], generators: Generators, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(0)
    generators.refuses = WeightsRefused("it has no base")
    found: list[int] = []
    write_complete = Deltas.write_complete

    def given_up(self: Deltas, directory: Path, _: Callable[[], bool]) -> dict[str, str]:
        try:
            return write_complete(self, directory, lambda: True)
        finally:
            found.extend(path.stat().st_size for path in directory.iterdir())

    monkeypatch.setattr(Deltas, "write_complete", given_up)
    with pytest.raises(StoreError, match="not needed any more"):
        publish(1)
    assert sum(found) == 0


def test_a_version_that_is_refused_although_it_was_completed_ends_the_run(
    publish: Callable[[int], Version], generators: Generators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_module, "VISIBLE_S", 0.0)
    publish(0)
    generators.refuses = WeightsRefused("another model")
    with pytest.raises(WeightsRefused, match="another model"):
        publish(1)
    assert generators.asked == [V0, V1, V1]
