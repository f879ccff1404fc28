"""Two ranks publish deltas. Each makes that of its own part. Both write complete files if a generator needs them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from anyio.from_thread import BlockingPortal, start_blocking_portal
from safetensors.torch import load_file, save_file

from support.delta_versions import Replica
from support.models import make_tiny_model, make_tokenizer
from support.ranks import run_ranks
from tandem_protocol.chains import is_complete
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import PublishConfig, TrainerConfig
from tandem_protocol.errors import WeightsRefused
from tandem_protocol.messages import PROTOCOL_VERSION, SetWeights
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer.learner.learner import Learner
from tandem_trainer.learner.shards import model_tensors
from tandem_trainer.publish import Publisher, fingerprint_of
from tandem_trainer.ranks import together

CASES = ("ddp", "fsdp2")
REFUSED = [Version(step, 1) for step in (2, 3, 4)]
"""After the third one, no version has deltas."""
STEPS = 7
BASE, SENT_AGAIN, AFTER, LAST = (Version(step, 2) for step in range(4))


class Generator:
    """Stands in for the client on the main process. Refuses the deltas of some versions."""

    protocols = SimpleNamespace(oldest=PROTOCOL_VERSION)

    def __init__(self, store: WeightStore, folder: Path) -> None:
        self.store, self.folder, self.replica = store, folder, Replica(store, folder)
        self.asked: list[Any] = []
        self.on_stale: Any = None

    async def expect(self, version: Version) -> None: ...

    async def set_weights(self, version: Version, weights: SetWeights, timeout_s: float) -> dict[str, Any]:
        self.asked.append(version)
        manifest, digest = self.store.read(version)
        if version in REFUSED and not is_complete(self.store, manifest):
            raise WeightsRefused("a base is missing")
        files = self.replica.switch(manifest, digest)
        assert digest == weights.manifest_digest
        served = {name: tensor for file in files for name, tensor in load_file(file).items()}
        save_file(served, self.store.root / f"served-{version}.safetensors")
        return {}


def publish(model_dir: Path, out: Path) -> None:
    """Run on each rank: publish, change a few parameters, and publish again behind that."""
    accelerator = Accelerator(cpu=True)
    for case in CASES:
        options = {"max_steps": 1, "output_dir": out, "rewards": [{"function": "rewards:r"}],
                   "learner": {"parallelism": case}}  # fmt: skip
        torch.manual_seed(0)
        config, shared = TrainerConfig.model_validate(options), SharedConfig(model=str(model_dir))
        learner = Learner(shared, config, make_tokenizer(), accelerator, needs_reference=False)
        store = WeightStore(out / case)
        if accelerator.is_main_process:
            (out / case / "versions").mkdir(parents=True)
        client: Any = Generator(store, out / f"local-{case}")
        with start_blocking_portal() as portal:
            make = partial(
                Publisher,
                store=store, client=client, portal=portal,
                wait=lambda task: task and together(accelerator, task.result, 60),
                config=PublishConfig(keep=9, delta="always"), run_name="r", dtype=torch.bfloat16,
                model_fingerprint=fingerprint_of(learner.model, model_dir), accelerator=accelerator,
            )  # fmt: skip
            publish_steps(make(attempt=1), learner, store)
            publish_for_one_that_starts_again(make(attempt=2), learner, client, portal)


def publish_next(publisher: Publisher, learner: Learner, step: int, store: WeightStore, *, behind: bool) -> None:
    expected = dict(model_tensors(learner.model, torch.bfloat16))  # every rank gathers
    if publisher._accelerator.is_main_process:
        save_file(expected, store.root / f"expected-{step}.{publisher._attempt}.safetensors")
    publisher(learner.model, step, behind=behind)
    for parameter in learner.model.parameters():
        local = getattr(parameter, "_local_tensor", parameter.data)
        local.view(-1)[:: 97 + step] += 1.0


def publish_steps(publisher: Publisher, learner: Learner, store: WeightStore) -> None:
    for step in range(STEPS):
        publish_next(publisher, learner, step, store, behind=True)
    publisher.wait()
    publisher.close()


def publish_for_one_that_starts_again(
    publisher: Publisher, learner: Learner, client: Generator, portal: BlockingPortal
) -> None:
    """Publish a base and a delta, and then start the generator again, without a base. Twice.

    At the second time, the next version begins while the complete files are being written.
    """
    publish: Callable[..., None] = partial(publish_next, publisher, learner, store=client.store)
    is_main = publisher._accelerator.is_main_process

    def start_again(base: Version) -> None:
        shutil.rmtree(client.store.directory(base))
        client.replica.kill()
        client.replica = Replica(client.store, client.folder)
        client.asked.clear()

    async def learns_that_it_is_stale(*, waits: bool) -> None:
        client.on_stale(SENT_AGAIN)
        assert publisher._again
        if waits:
            await publisher._again

    publish(step=0, behind=True)
    publish(step=1, behind=False)
    if is_main:
        start_again(BASE)
        portal.call(partial(learns_that_it_is_stale, waits=True))
        assert client.asked == [SENT_AGAIN, SENT_AGAIN]
    publisher._accelerator.wait_for_everyone()
    publish(step=2, behind=True)
    publisher.wait()
    publisher._accelerator.wait_for_everyone()
    if is_main:
        start_again(SENT_AGAIN)
        portal.call(partial(learns_that_it_is_stale, waits=False))
    publish(step=3, behind=True)
    publisher.wait()
    publisher.close()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    run_ranks(2, publish, make_tiny_model(folder / "model"), folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_every_version_is_served_as_it_was_and_each_rank_has_its_delta(out: Path, case: str) -> None:
    store = WeightStore(out / case)
    for step in range(STEPS):
        version = Version(step, 1)
        expected = load_file(store.root / f"expected-{version}.safetensors")
        served = load_file(store.root / f"served-{version}.safetensors")
        assert served.keys() == expected.keys()
        assert all(torch.equal(served[name], expected[name]) for name in expected)
        manifest, _ = store.read(version)
        store.verify(manifest)
        assert len(manifest.files) == 2
        assert len(manifest.deltas) == (2 if 0 < step <= 4 else 0)
        assert is_complete(store, manifest) == (step != 1)
    assert not list(store.root.glob("versions/.*")) + list(store.root.glob("versions/*/.*"))


@pytest.mark.parametrize("case", CASES)
def test_a_generator_that_starts_without_the_base_is_sent_the_complete_files_of_both_ranks(
    out: Path, case: str
) -> None:
    store = WeightStore(out / case)
    for version in (SENT_AGAIN, AFTER, LAST):
        expected = load_file(store.root / f"expected-{version}.safetensors")
        served = load_file(store.root / f"served-{version}.safetensors")
        assert all(torch.equal(served[name], expected[name]) for name in expected)
    assert len(store.read(AFTER)[0].deltas) == len(store.read(LAST)[0].deltas) == 2, "deltas go on"
