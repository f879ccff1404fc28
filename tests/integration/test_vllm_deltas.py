"""The real vLLM engine serves delta versions: its tokens are those of `transformers` with the published weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from anyio import to_thread
from anyio.from_thread import BlockingPortal, start_blocking_portal
from transformers import AutoModelForCausalLM, PreTrainedModel

from support import forked_vllm
from support.generators import Generator
from support.models import make_tiny_model
from support.published_policies import TOLERANCE, PublishedPolicies, save
from tandem_protocol.chains import is_complete
from tandem_protocol.config.trainer import PublishConfig
from tandem_protocol.errors import WeightsRefused
from tandem_protocol.messages import PROTOCOL_VERSION, ServedWeights, SetWeights
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer.learner.shards import model_tensors
from tandem_trainer.publish import Publisher, fingerprint_of

pytestmark = pytest.mark.vllm

TIMEOUT_S = 60.0
BROKEN_LOAD = "3"
"""The load that raises an error half-way. The first is a complete version, the second its first delta."""
CHAIN = 4


class OneGenerator:
    """Stands in for the trainer's client. Notes what the generator answers, and what it samples after an error."""

    protocols = SimpleNamespace(oldest=PROTOCOL_VERSION)

    def __init__(self, generator: Generator, policies: PublishedPolicies) -> None:
        self.generator, self.policies = generator, policies
        self.errors: list[str] = []
        self.on_stale: Any = None

    async def set_weights(self, version: Version, weights: SetWeights, timeout_s: float) -> dict[str, ServedWeights]:
        return {"a": await to_thread.run_sync(self._set, version, weights.manifest_digest)}

    def _set(self, version: Version, digest: str) -> ServedWeights:
        old = self.generator.served.version
        for _ in range(2):
            answer = self.generator.put(version, digest)
            if answer.status_code == 200:
                return ServedWeights.model_validate(answer.json())
            self.errors.append(answer.json()["code"])
            assert self.policies.ask(self.generator).is_of(old), "the old version serves meanwhile"
            if not answer.json()["retryable"]:
                break
        raise WeightsRefused(answer.json()["message"])


class Run:
    """A generator with vLLM, and a trainer that publishes to it."""

    def __init__(self, folder: Path, portal: BlockingPortal, generator: Generator, policies: PublishedPolicies) -> None:
        self.generator, self.policies = generator, policies
        self.local, self.store = folder / "local", WeightStore(folder / "weights")
        self.client = OneGenerator(generator, policies)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "model")
        client: Any = self.client
        self._publish = Publisher(
            store=self.store, client=client, portal=portal, wait=lambda task: task and task.result(TIMEOUT_S),
            config=PublishConfig(delta="always", keep=CHAIN), run_name="r", attempt=1, dtype=torch.bfloat16,
            model_fingerprint=fingerprint_of(self.model, folder / "model"), accelerator=Accelerator(cpu=True),
        )  # fmt: skip
        self.step = 0

    @torch.no_grad()
    def publish(self) -> Version:
        """Change one percent of the parameters, and publish."""
        self.step += 1
        for parameter in self.model.parameters():
            mask = torch.rand(parameter.shape) < 0.01
            parameter[mask] = torch.randn(int(mask.sum()))
        save(self.policies.folder, Version(self.step, 1), dict(model_tensors(self.model, torch.bfloat16)))
        return self._publish(self.model, self.step)

    def is_delta(self, version: Version) -> bool:
        """Whether the store has only the delta of a version."""
        return not is_complete(self.store, self.store.read(version)[0])

    @property
    def made(self) -> set[str]:
        """The versions whose complete files are on this machine."""
        return {folder.name.partition("-")[0] for folder in self.local.glob("*/*")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("deltas")
    model = make_tiny_model(folder / "model", initializer_range=0.3)
    policies = PublishedPolicies(model, folder / "policies")
    weights = WeightStore(folder / "weights")
    torch.manual_seed(0)
    generator = Generator(
        "vllm", model, weights.root, "--generator.materialize_dir", str(folder / "local"), log=folder / "log",
        program=(str(folder / "loaded.jsonl"), "broken", BROKEN_LOAD), spawn=forked_vllm.spawn,
    )  # fmt: skip
    try:
        generator.wait_ready()
        with weights.writer("test"), start_blocking_portal() as portal:
            yield Run(folder, portal, generator, policies)
    finally:
        generator.kill()
        generator.client.close()


def test_a_chain_of_deltas_is_served_exactly_and_a_failed_load_goes_back_to_the_files_that_were_kept(run: Run) -> None:
    for number in range(CHAIN):
        version = run.publish()
        assert run.policies.ask(run.generator).is_of(version), run.policies.ask(run.generator)
        assert run.is_delta(version) == (number > 0)
        if number:
            assert run.policies.distance(Version(version.step - 1, 1), version) > 50 * TOLERANCE, "it could not fail"
            assert f"{version.step:06d}.1" in run.made
    assert run.client.errors == ["switch_failed"]
    assert "loading version 2.1 again" in run.generator.log.read_text()


@pytest.mark.parametrize("damage", ["a word of the delta", "the end of the delta"])
def test_a_damaged_delta_is_refused_and_the_same_version_is_completed(
    run: Run, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    run.publish()
    run.publish()
    run.client.errors.clear()
    with monkeypatch.context() as patched:
        patched.setattr(run.store, "commit", damaging(run.store.commit, damage))
        version = run.publish()
    assert run.client.errors == ["weights_refused"]
    assert not run.is_delta(version)
    assert run.policies.ask(run.generator).is_of(version)
    after = run.publish()
    assert run.is_delta(after)
    assert run.policies.ask(run.generator).is_of(after)


def damaging(commit: Callable[..., Any], damage: str) -> Callable[..., Any]:
    """Commit a version, then damage its delta."""

    def damaged(staged: Path, version: Version, **options: Any) -> Any:
        manifest, digest = commit(staged, version, **options)
        (delta,) = (staged.parent / f"{version.step:06d}.{version.attempt}").glob("*.delta")
        data = bytearray(delta.read_bytes())
        if damage == "a word of the delta":
            data[len(data) // 2] ^= 1
        else:
            del data[-1]
        delta.write_bytes(data)
        return manifest, digest

    return damaged


def test_a_generator_that_stops_leaves_no_files_of_deltas(run: Run) -> None:
    run.publish()
    run.publish()
    assert run.made
    assert run.generator.stop() == 0
    assert not [*run.local.iterdir()]
