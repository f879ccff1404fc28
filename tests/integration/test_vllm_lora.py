"""The real vLLM engine samples from the trainer's policy with an adapter, also after a switch in flight."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.generators import Generator, running
from support.models import make_tiny_model
from support.reference_policy import ReferencePolicy
from tandem_protocol.config.learning import LoraConfig
from tandem_protocol.fingerprint import checkpoint_shapes, fingerprint
from tandem_protocol.messages import Group, Prompt, SwitchMode
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer.learner.lora import add_adapter, write_adapter

pytestmark = pytest.mark.vllm

PROMPT = [5, 9, 13]
TEMPERATURE = 0.7
TOLERANCE, LONG_TOLERANCE = 1e-4, 0.02
"""Bounds of |generator logprob - trainer logprob|, in nats, in float32: of the mean, and of the maximum in a request.
With another policy the maximum is about 4."""
V1, V2, V3 = Version(1, 1), Version(2, 1), Version(3, 1)


class Adapted(ReferencePolicy):
    """A policy with an adapter. Only the adapter is changed and published."""

    def __init__(self, model_dir: Path, store: WeightStore, *, r: int) -> None:
        super().__init__(model_dir, store)
        add_adapter(self.model, LoraConfig(r=r, alpha=3.0), str(model_dir))

    def change(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def publish(self, version: Version, tensors: object = None) -> str:
        assert tensors is None
        (self.store.root / "versions").mkdir(parents=True, exist_ok=True)
        ours = fingerprint(self.model_dir, checkpoint_shapes(self.model_dir))
        with self.store.staging(version, needs_bytes=1 << 20) as staged:
            write_adapter(self.model, staged, torch.float32, is_main=True)
            return self.store.commit(staged, version, run="test", fingerprint=ours, kind="lora")[1]

    def mismatch(self, group: Group, version: Version) -> torch.Tensor:
        """Return |generator logprob - trainer logprob| of the tokens that `version` sampled."""
        found = []
        for completion in group.completions:
            labels = [span.version for span in completion.versions for _ in range(span.tokens)]
            here = torch.tensor([label == version for label in labels])
            difference = self.logprobs(PROMPT, completion, TEMPERATURE) - torch.tensor(completion.logprobs)
            found.append(difference[here].abs())
        return torch.cat(found)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Generator, Adapted]]:
    root = tmp_path_factory.mktemp("lora")
    model = make_tiny_model(root / "model", initializer_range=0.3, max_position_embeddings=1024)
    arguments = ("--enable-lora", "--max-lora-rank", "8")
    with running("vllm", model, root / "weights", *arguments, log=root / "generator.log") as generator:
        yield generator, Adapted(model, WeightStore(root / "weights"), r=4)


def _switch(generator: Generator, version: Version, digest: str) -> None:
    response = generator.put(version, digest, SwitchMode.IN_FLIGHT)
    assert response.status_code == 200, response.text


def _sample(generator: Generator, tokens: int = 40) -> Group:
    (group,) = generator.rollouts(
        Prompt(token_ids=PROMPT), n=4, max_tokens=tokens, temperature=TEMPERATURE, ignore_eos=True
    )
    return group


def test_tokens_are_sampled_from_the_trainers_policy_after_each_switch(served: tuple[Generator, Adapted]):
    generator, policy = served
    for seed, version in enumerate((V1, V2)):
        before = _sample(generator)
        policy.change(seed)
        assert policy.mismatch(before, generator.served.version).mean() > 0.1, (
            "the policies must differ before the switch"
        )
        _switch(generator, version, policy.publish(version))
        assert policy.mismatch(_sample(generator), version).mean() <= TOLERANCE

    # In flight: each token comes from the adapter version that its span names.
    policy.change(3)
    digest = policy.publish(V3)
    groups: list[Group] = []
    thread = threading.Thread(target=lambda: groups.append(_sample(generator, tokens=200)))
    thread.start()
    generator.wait_until_running(4)
    _switch(generator, V3, digest)
    thread.join(120)
    (group,) = groups
    assert {span.version for c in group.completions for span in c.versions} == {V2, V3}
    assert policy.mismatch(group, V3).max() <= LONG_TOLERANCE
    policy.change(1)
    assert policy.mismatch(group, V2).max() <= LONG_TOLERANCE


def test_versions_that_cannot_be_served_are_refused_with_the_fix(served: tuple[Generator, Adapted]):
    generator, policy = served
    full = ReferencePolicy(policy.model_dir, policy.store)
    wide = Adapted(policy.model_dir, policy.store, r=16)
    for version, other, words in ((Version(8, 1), full, "enable_lora"), (Version(9, 1), wide, "max_lora_rank")):
        response = generator.put(version, other.publish(version))
        assert response.status_code == 422
        assert words in response.text
    assert generator.served.version in (V3, Version(0, 0))
    _sample(generator)
