"""The trainer publishes deltas when it may, complete versions when it must, and the generators serve the same bytes."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from anyio.from_thread import BlockingPortal, start_blocking_portal
from transformers import LlamaForCausalLM, PreTrainedModel

from support.delta_versions import Generators, has_delta, is_served, needs_parent, update
from support.models import make_tiny_model
from tandem_protocol.chains import is_complete
from tandem_protocol.config.learning import LoraConfig
from tandem_protocol.config.trainer import PublishConfig
from tandem_protocol.errors import WeightsRefused
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer import deltas
from tandem_trainer.learner.lora import add_adapter
from tandem_trainer.learner.shards import model_tensors
from tandem_trainer.publish import Publisher, fingerprint_of

TIMEOUT_S = 60.0
Make = Callable[..., Publisher]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(model_dir: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(model_dir)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[WeightStore]:
    store = WeightStore(tmp_path / "weights")
    with store.writer("test"):
        yield store


@pytest.fixture
def generators(store: WeightStore, tmp_path: Path) -> Generators:
    return Generators(store, tmp_path / "local")


@pytest.fixture
def portal(monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockingPortal]:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture
def reports() -> list[int]:
    """The bytes of each version that is served."""
    return []


@pytest.fixture
def make(
    store: WeightStore, generators: Generators, portal: BlockingPortal, model_dir: Path, reports: list[int]
) -> Make:
    def make(
        model: PreTrainedModel, *, dtype: torch.dtype = torch.bfloat16, attempt: int = 1, delta: str = "always"
    ) -> Publisher:
        client: Any = generators
        return Publisher(
            store=store, client=client, portal=portal, wait=lambda task: task and task.result(TIMEOUT_S),
            config=PublishConfig.model_validate({"delta": delta}), run_name="r", attempt=attempt, dtype=dtype,
            model_fingerprint=fingerprint_of(model, model_dir), accelerator=Accelerator(cpu=True),
            report=lambda _, size_bytes: reports.append(size_bytes),
        )  # fmt: skip

    return make


@pytest.mark.parametrize("behind", [False, True])
def test_versions_after_the_first_are_deltas_and_are_served_exactly(
    make: Make, model: PreTrainedModel, generators: Generators, store: WeightStore, reports: list[int], behind: bool
) -> None:
    publish = make(model)
    for step in range(5):
        version = publish(model, step, behind=behind)
        published = {name: tensor.clone() for name, tensor in model_tensors(model, torch.bfloat16)}
        update(model)  # while it is written, if behind
        publish.wait()
        served = generators.tensors()
        assert all(torch.equal(served[name], published[name]) for name in published)
        assert has_delta(store, version) == needs_parent(store, version) == (step > 0)
    assert len(reports) == 5
    assert max(reports[1:]) < reports[0] / 10


def test_a_delta_follows_on_a_complete_version_and_the_chain_is_bounded(
    make: Make, model: PreTrainedModel, generators: Generators, store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "MAX_LENGTH", 4)
    publish = make(model)
    kinds = []
    for step in range(9):
        version = publish(model, step)
        kinds.append((has_delta(store, version), needs_parent(store, version)))
        generators.join("late")
        update(model, 0.001)
    complete, delta, both = (False, False), (True, True), (True, False)
    assert kinds == [complete, *[delta] * 3, both, *[delta] * 3, both]
    assert len(store.versions()) <= 2 + 4


def test_a_chain_is_bounded_by_its_bytes(make: Make, model: PreTrainedModel, store: WeightStore) -> None:
    publish = make(model)
    lengths, length = [], 0
    for step in range(20):
        version = publish(model, step)
        length = length + 1 if needs_parent(store, version) else 0
        lengths.append(length)
        size = sum(f.stat().st_size for v in store.versions() for f in store.directory(v).iterdir())
        assert size < 4 * publish._store.read(version)[0].size_bytes, "publish.keep + 2 versions"
        update(model, 0.04)
    assert 1 < max(lengths) < 8
    assert lengths.count(0) > 2


@pytest.mark.parametrize("case", ["never", "float32", "lora"])
def test_what_cannot_be_a_delta_is_published_as_before(
    make: Make, model: PreTrainedModel, generators: Generators, store: WeightStore, model_dir: Path, case: str
) -> None:
    generators.replicas.clear()
    if case == "lora":
        add_adapter(model, LoraConfig(r=4), str(model_dir))
    publish = make(
        model,
        dtype=torch.float32 if case == "float32" else torch.bfloat16,
        delta="never" if case == "never" else "always",
    )
    for step in range(3):
        assert not has_delta(store, publish(model, step))


def test_a_trainer_that_starts_again_publishes_a_complete_version_first(
    make: Make, model: PreTrainedModel, generators: Generators, store: WeightStore
) -> None:
    first = make(model)
    first(model, 0)
    update(model)
    first(model, 1)
    again = make(model, attempt=2)
    assert not has_delta(store, again(model, 1))
    update(model)
    assert has_delta(store, again(model, 2))
    assert is_served(generators, model)


def test_a_late_replica_whose_base_is_damaged_gets_the_same_version_in_full(
    make: Make, model: PreTrainedModel, generators: Generators, store: WeightStore, caplog: pytest.LogCaptureFixture
) -> None:
    publish = make(model)
    for step in range(3):
        publish(model, step)
        update(model)
    generators.join("late")
    for file in store.directory(Version(0, 1)).glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    generators.asked.clear()
    with caplog.at_level(logging.WARNING):
        version = publish(model, 3)
    assert generators.asked == [version, version]
    assert "Version 3.1 is now published in full" in caplog.text
    assert is_served(generators, model, "a")
    assert is_served(generators, model, "late")
    assert not needs_parent(store, version)
    update(model)
    assert needs_parent(store, publish(model, 4)), "deltas go on"
    assert is_served(generators, model, "late")


@pytest.mark.parametrize("at_least", [Version(1, 1), Version(2, 1), Version(3, 1)])
def test_the_current_version_is_sent_again_in_full_to_a_generator_that_starts_without_a_base(
    make: Make, model: PreTrainedModel, generators: Generators, store: WeightStore, portal: BlockingPortal,
    at_least: Version,
) -> None:  # fmt: skip
    publish = make(model)
    for step in range(3):
        version = publish(model, step, behind=True)
        if step < 2:
            update(model)
    publish.wait()
    shutil.rmtree(store.directory(Version(0, 1)))
    generators.replicas.clear()
    generators.join("a")

    async def learns_that_it_is_stale() -> None:
        for _ in range(3):
            generators.on_stale(at_least)
        if publish._again:
            await publish._again

    generators.asked.clear()
    portal.call(learns_that_it_is_stale)
    assert generators.asked == ([version, version] if at_least <= version else [])
    assert is_complete(store, store.read(version)[0]) == bool(generators.tensors()) == (at_least <= version)
    if at_least <= version:
        assert is_served(generators, model)
    update(model)
    publish(model, 3)
    assert is_served(generators, model)


def test_when_a_base_is_missing_the_version_after_the_next_has_its_complete_files(
    make: Make, model: PreTrainedModel, generators: Generators, store: WeightStore
) -> None:
    publish = make(model)
    publish(model, 0)
    update(model)
    publish(model, 1)
    shutil.rmtree(store.directory(Version(0, 1)))
    update(model)
    assert needs_parent(store, publish(model, 2)), "the replica that runs does not need the base"
    update(model)
    assert not needs_parent(store, publish(model, 3))
    generators.join("late")
    update(model)
    publish(model, 4)
    assert is_served(generators, model, "late")


def test_the_chain_of_deltas_is_not_read_in_the_learners_time(
    make: Make, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[threading.Thread] = []
    find = vars(deltas)["sources"]

    def watched(*arguments: Any) -> Any:
        readers.append(threading.current_thread())
        return find(*arguments)

    monkeypatch.setattr(deltas, "sources", watched)
    publish = make(model)
    for step in range(3):
        publish(model, step, behind=True)
        publish.wait()
        update(model)
    assert len(readers) == 3
    assert threading.main_thread() not in readers


@pytest.mark.parametrize(("served", "refused"), [(0, 1), (1, 3)], ids=["the first one", "three of them"])
def test_deltas_end_when_the_first_one_is_refused_or_three_are(
    make: Make, model: PreTrainedModel, generators: Generators, store: WeightStore, caplog: pytest.LogCaptureFixture,
    served: int, refused: int,
) -> None:  # fmt: skip
    publish = make(model)
    complete = store.complete

    def served_at_last(*arguments: Any) -> None:
        complete(*arguments)
        generators.refuses = None

    store.complete = served_at_last  # type: ignore[method-assign,assignment]  # of this test's store only
    for step in range(1 + served):
        publish(model, step)
        update(model)
    for step in range(refused):
        assert "From now on" not in caplog.text
        generators.refuses = WeightsRefused("this image has no numpy")
        assert has_delta(store, publish(model, 1 + served + step))
        update(model)
    assert "From now on, all versions are published in full" in caplog.text
    for step in range(3):
        assert not has_delta(store, publish(model, 1 + served + refused + step))
        assert is_served(generators, model)
        update(model)


def test_generators_of_an_earlier_contract_get_complete_versions(
    make: Make, model: PreTrainedModel, generators: Generators, store: WeightStore
) -> None:
    """They refuse a manifest with deltas, also if all files are there."""
    publish, found = make(model), []
    for step, generators.protocols.oldest in enumerate((1, 1, 2, 2, 1, 2)):
        found.append(has_delta(store, publish(model, step)))
        assert is_served(generators, model)
        update(model)
    assert found == [False, False, False, True, False, False], "a copy of the last version comes first"


def test_a_complete_version_that_is_refused_ends_the_run(
    make: Make, model: PreTrainedModel, generators: Generators
) -> None:
    publish = make(model)
    generators.refuses = WeightsRefused("another model")
    with pytest.raises(WeightsRefused, match="another model"):
        publish(model, 0)
    assert generators.asked == [Version(0, 1)], "there is nothing to complete"


@pytest.mark.parametrize("delta", ["never", "always"])
def test_a_version_without_deltas_of_which_a_file_is_lost_is_refused_at_once(
    make: Make, model: PreTrainedModel, generators: Generators, store: WeightStore, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, delta: str,
) -> None:  # fmt: skip
    commit = store.commit

    def loses(*arguments: Any, **options: Any) -> Any:
        manifest, digest = commit(*arguments, **options)
        (store.directory(manifest.version) / manifest.files[0].name).unlink()
        return manifest, digest

    monkeypatch.setattr(store, "commit", loses)
    generators.refuses = WeightsRefused("a file is missing")
    with pytest.raises(WeightsRefused, match="a file is missing"):
        make(model, delta=delta)(model, 0)
    assert generators.asked == [Version(0, 1)]
    assert "deltas" not in caplog.text


SLOW = {"is_in_memory": lambda _: False, "SLOW_BYTES_PER_S": 1e12, "MIN_BYTES": 1, "available_bytes": lambda: None}


@pytest.mark.parametrize(
    "changed",
    [{}, {"SLOW_BYTES_PER_S": 0.0}, {"MIN_BYTES": 1 << 40}, {"is_in_memory": lambda _: True}],
    ids=["slow", "fast", "small", "in memory"],
)
def test_auto_chooses_deltas_on_a_slow_volume_for_large_versions(
    make: Make, model: PreTrainedModel, store: WeightStore, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    for name, value in (SLOW | changed).items():
        monkeypatch.setattr(deltas, name, value)
    publish, found = make(model, delta="auto"), []
    for step in range(6):
        found.append(has_delta(store, publish(model, step)))
        update(model)
    assert found == [False] * 4 + [not changed] * 2, "three are measured, and the next one is the first copy"
