"""A version that is published behind an update holds the weights from before it, and its error is raised later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from anyio.from_thread import start_blocking_portal
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from support.models import make_tiny_model
from support.run_folders import GROUPS, Saved, make_run
from tandem_protocol.config.learning import LoraConfig
from tandem_protocol.config.trainer import PublishConfig
from tandem_protocol.errors import StoreError, WeightsRefused
from tandem_protocol.messages import ServedWeights, SetWeights, SwitchTimings
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer import loop, publication
from tandem_trainer.learner.lora import adapter_tensors, add_adapter
from tandem_trainer.learner.safetensors_file import write_files
from tandem_trainer.learner.shards import model_tensors
from tandem_trainer.publish import Publisher, fingerprint_of

TIMEOUT_S = 60.0
V1, V2 = Version(1, 1), Version(2, 1)


class Generators:
    """Stands in for the client. `error` is what the next switches raise."""

    error: Exception | None = None

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        self.expected: list[Version] = []
        self.served: list[Version] = []

    async def expect(self, version: Version) -> None:
        self.expected.append(version)

    async def set_weights(self, version: Version, weights: SetWeights, timeout_s: float) -> dict[str, ServedWeights]:
        assert self.store.latest() == version, "it is committed"
        if self.error:
            raise self.error
        self.served.append(version)
        timings = SwitchTimings(visible_s=1.0, verify_s=3.0, pause_s=3.0, load_s=4.0, total_s=10.0)
        slowest = ServedWeights(version=version, manifest_digest=weights.manifest_digest, timings=timings)
        fast = timings.model_copy(update={"load_s": 0.0, "total_s": 6.0})
        return {
            "a": slowest.model_copy(update={"timings": fast}),
            "b": slowest,
            "c": slowest.model_copy(update={"timings": None}),
        }


class World:
    """A publisher whose threads write when `may_write` is set."""

    def __init__(self, publisher: Publisher, generators: Generators, may_write: threading.Event) -> None:
        self.publish, self.generators, self.may_write = publisher, generators, may_write
        self.store = generators.store
        self.reports: list[tuple[dict[str, float], int]] = []

    def tensors(self, version: Version) -> dict[str, Tensor]:
        """What the store has of a version."""
        manifest, _ = self.store.read(version)
        self.store.verify(manifest)
        files = [self.store.directory(version) / file.name for file in manifest.files]
        return {k: v for file in files if file.suffix == ".safetensors" for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(model_dir: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(model_dir)


@contextmanager
def world(
    folder: Path, model: PreTrainedModel, model_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> Iterator[World]:
    store, may_write = WeightStore(folder / "weights"), threading.Event()
    generators = Generators(store)

    def write(directory: Path, files: Mapping[str, Mapping[str, Tensor]], tensors: Any) -> dict[str, str]:
        assert may_write.wait(TIMEOUT_S)
        return write_files(directory, files, tensors)

    monkeypatch.setattr(publication, "write_files", write)
    reports: list[tuple[dict[str, float], int]] = []
    with store.writer("test"), start_blocking_portal() as portal:
        client: Any = generators
        publisher = Publisher(
            store=store, client=client, portal=portal, wait=lambda task: task and task.result(TIMEOUT_S),
            config=PublishConfig(), run_name="r", attempt=1, model_fingerprint=fingerprint_of(model, model_dir),
            dtype=dtype, accelerator=Accelerator(cpu=True), report=lambda *report: reports.append(report),
        )  # fmt: skip
        here = World(publisher, generators, may_write)
        here.reports = reports
        may_write.set()
        publisher(model, 0, behind=True)  # the first is waited for
        assert generators.served == [Version(0, 1)]
        may_write.clear()
        try:
            yield here
        finally:
            may_write.set()
            publisher.close()


@pytest.fixture
def here(tmp_path: Path, model: PreTrainedModel, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with world(tmp_path, model, model_dir, monkeypatch, torch.float32) as one:
        yield one


@torch.no_grad()
def change(model: PreTrainedModel) -> None:
    """What an optimizer does: change the parameters in place."""
    for parameter in model.parameters():
        parameter += 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_version_in_flight_holds_the_weights_from_before_the_update(
    tmp_path: Path, model: PreTrainedModel, model_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: Any
) -> None:
    if kind == "lora":
        add_adapter(model, LoraConfig(r=2), "base")
    tensors: Callable[..., Any] = adapter_tensors if kind == "lora" else model_tensors
    with world(tmp_path, model, model_dir, monkeypatch, dtype) as here:
        for step in (1, 2):  # the second uses the memory of the first again
            before = {name: tensor.clone() for name, tensor in tensors(model, dtype)}
            assert here.publish(model, step, behind=True) == Version(step, 1)
            change(model)
            assert here.store.latest() == Version(step - 1, 1)
            here.may_write.set()
            here.publish.wait()
            here.may_write.clear()
            written = here.tensors(Version(step, 1))
            assert written.keys() == before.keys()
            assert all(torch.equal(written[name], before[name]) for name in before)
        assert here.generators.served == [Version(step, 1) for step in (0, 1, 2)]
        assert here.generators.expected == [V1, V2]


def test_a_version_starts_when_the_one_before_it_is_served(here: World, model: PreTrainedModel) -> None:
    here.publish(model, 1, behind=True)
    staged: list[list[Version]] = []
    staging = here.store.staging

    def watched(*args: Any, **options: Any) -> Any:
        staged.append(list(here.generators.served))
        return staging(*args, **options)

    here.store.staging = watched  # type: ignore[method-assign]
    threading.Timer(0.1, here.may_write.set).start()
    here.publish(model, 2)
    assert staged[0] == [Version(0, 1), V1]
    assert here.publish.in_flight is None
    assert here.generators.served[-1] == V2


@pytest.mark.parametrize("place", ["write", "switch"])
def test_an_error_of_the_version_in_flight_is_raised_by_the_next_one(
    here: World, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    error = StoreError("the volume is full") if place == "write" else WeightsRefused("a file is damaged")

    def fail(*_: object) -> dict[str, str]:
        raise error

    if place == "write":
        monkeypatch.setattr(publication, "write_files", fail)
    here.generators.error = error
    here.publish(model, 1, behind=True)
    here.may_write.set()
    with pytest.raises(type(error), match=str(error)):
        here.publish(model, 2, behind=True)
    assert not list(here.store.root.glob("versions/.*"))
    assert V2 not in here.store.versions()
    assert (V1 in here.store.versions()) == (place == "switch")


def test_old_versions_are_deleted_behind_the_update(
    here: World, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, retain = [], here.store.retain

    def recorded(keep: int) -> list[Version]:
        threads.append(threading.current_thread())
        return retain(keep)

    monkeypatch.setattr(here.store, "retain", recorded)
    here.may_write.set()
    for step in range(1, 5):
        here.publish(model, step, behind=True)
    here.publish.wait()
    assert len(threads) == 4
    assert threading.current_thread() not in threads
    assert here.store.versions() == [Version(3, 1), Version(4, 1)]


def test_waiting_for_something_else_ends_with_the_error_of_the_version_in_flight(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    never: Future[None] = Future()
    publishing: Future[None] = Future()
    publishing.set_exception(WeightsRefused("a file is damaged"))
    with pytest.raises(WeightsRefused):
        run.wait(never, behind=publishing)
    assert never.cancelled()
    done: Future[int] = Future()
    done.set_result(5)
    served: Future[None] = Future()
    served.set_result(None)
    assert run.wait(done, behind=served) == 5


def test_the_report_has_the_time_of_each_phase_on_the_slowest_generator(here: World, model: PreTrainedModel) -> None:
    here.publish(model, 1, behind=True)
    here.may_write.set()
    here.publish.wait()
    timings, size_bytes = here.reports[-1]
    switch = {name: timings.pop(name) for name in ("visible_s", "verify_s", "pause_s", "load_s")}
    assert switch == {"visible_s": 1.0, "verify_s": 2.0, "pause_s": 3.0, "load_s": 4.0}
    total_s = timings.pop("total_s")
    assert set(timings) == {"gather_s", "copy_s", "write_s", "commit_s"}
    assert all(seconds > 0 for seconds in timings.values())
    assert sum(timings.values()) < total_s
    assert size_bytes == sum(tensor.nbytes for tensor in here.tensors(V1).values())


def test_a_run_that_is_stopped_waits_for_its_last_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = make_run(tmp_path), list[str]()
    monkeypatch.setattr(run, "should_stop", lambda: "publish 1" in calls)
    monkeypatch.setattr(run, "last_checkpoint", lambda *_: calls.append("checkpoint"))

    def publish(step: int) -> Version:
        calls.append(f"publish {step}")
        return Version(step, 1)

    saved: Any = Saved()
    algorithm: Any = SimpleNamespace(make_batch=lambda *_: SimpleNamespace(has_signal=True))
    loop.train(
        run._config, run, saved, saved, algorithm, sample=lambda _: GROUPS, update=lambda *_: {"loss": 0.25},
        publish=publish, published=lambda: calls.append("published"), evaluate=lambda *_: None,
    )  # fmt: skip
    assert calls == ["publish 0", "publish 1", "published", "checkpoint"]
