"""`PUT /weights/{version}` over HTTP, with the mock and with vLLM: successful switches and refused versions."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from support.models import make_tiny_model
from support.reference_policy import ReferencePolicy
from support.served import PROMPTS, Served, wait_until
from tandem_protocol.errors import ErrorBody
from tandem_protocol.messages import (
    Group,
    ServedWeights,
    SwitchMode,
)
from tandem_protocol.version import Version
from tandem_rollout.answers import read_served


def test_a_switch_changes_the_policy_and_a_repeated_switch_does_nothing(served: Served) -> None:
    before = served.greedy()
    version = served.next
    served.policy.change(version.step)
    digest = served.policy.publish(version)
    response = served.generator.put(version, digest)
    answer = read_served(response)
    assert (answer.version, answer.manifest_digest) == (version, digest)
    assert answer.timings is not None
    assert 0 < answer.timings.visible_s < answer.timings.verify_s < answer.timings.total_s
    assert "visible_s" not in response.json()["timings"], "earlier releases refuse unknown keys"
    assert served.greedy() != before
    again = ServedWeights(version=version, manifest_digest=digest)
    assert served.generator.served == again
    assert ServedWeights.model_validate(served.generator.put(version, digest).raise_for_status().json()) == again


def test_an_older_version_is_refused(served: Served) -> None:
    older = served.generator.served.version if served.generator.served.version.step else served.switch()
    digest = served.generator.served.manifest_digest
    assert digest is not None
    served.switch()
    message = f"got version {older}, expected one that is newer than the served version {served.next.step - 1}.1"
    refused(served, older, digest, 409, "older_version", message)


def test_a_draining_switch_lets_running_requests_finish_on_the_old_version(served: Served) -> None:
    before = served.generator.served.version
    version = served.next
    digest = served.policy.publish(version)
    groups: list[Group] = []
    asking = threading.Thread(
        target=lambda: groups.extend(served.generator.rollouts(*PROMPTS, n=8, max_tokens=600, ignore_eos=True))
    )
    asking.start()
    wait_until(lambda: served.runs(24))
    answer = ServedWeights.model_validate(served.generator.put(version, digest, SwitchMode.DRAIN).json())
    asking.join(60)
    assert answer.timings is not None
    assert answer.timings.pause_s > 0.05, "the switch did not meet a running request, so this shows nothing"
    versions = [span.version for group in groups for completion in group.completions for span in completion.versions]
    assert versions == [before] * 24


def refused(served: Served, version: Version, digest: str, status: int, code: str, *words: str) -> None:
    """Check that PUT is refused with this error, and that the old version is still served."""
    before = served.generator.served
    greedy = served.greedy()
    response = served.generator.put(version, digest)
    assert response.status_code == status
    error = ErrorBody.model_validate(response.json())
    assert error.code == code
    assert [word for word in words if word not in error.message] == [], error.message
    assert served.generator.served == before
    assert served.greedy() == greedy
    assert served.client.get("/readyz").status_code == 200


def first_shard(served: Served, version: Version) -> Path:
    return min(served.policy.store.directory(version).glob("*.safetensors"))


def truncate(shard: Path) -> str:
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    return f"{shard}: got {len(data) - 1} bytes, expected {len(data)}. The old version is still served"


def flip_a_byte(shard: Path) -> str:
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return f"{shard}: got xxh3-128"


def remove(shard: Path) -> str:
    shard.unlink()
    return f"No such file or directory: '{shard}'"


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, remove])
def test_damaged_weights_are_refused(served: Served, damage: Callable[[Path], str]) -> None:
    version = served.next
    served.policy.change(version.step)
    digest = served.policy.publish(version)
    refused(served, version, digest, 422, "weights_refused", damage(first_shard(served, version)))


def test_weights_with_another_shape_are_refused_by_name(served: Served) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = served.policy.tensors()
    version = served.next
    digest = served.policy.publish(version, tensors | {name: tensors[name][:-1].clone()})
    refused(
        served,
        version,
        digest,
        422,
        "weights_refused",
        f"1 parameter differs: {name}: trainer (63, 32), generator (64, 32)",
    )


def test_weights_without_a_tensor_are_refused_by_name(served: Served) -> None:
    tensors = served.policy.tensors()
    version = served.next
    del tensors["model.norm.weight"]
    digest = served.policy.publish(version, tensors)
    refused(served, version, digest, 422, "weights_refused", "model.norm.weight: trainer none, generator (32,)")


def test_weights_of_another_model_are_refused(served: Served, tmp_path: Path) -> None:
    other = ReferencePolicy(make_tiny_model(tmp_path, max_position_embeddings=64), served.policy.store)
    version = served.next
    refused(
        served, version, other.publish(version), 422, "weights_refused", "belongs to another model: its config differs"
    )


def test_a_manifest_of_another_run_is_refused(served: Served) -> None:
    version = served.next
    expected = served.policy.publish(version)
    shutil.rmtree(served.policy.store.directory(version))
    served.policy.change(version.step)
    found = served.policy.publish(version)
    refused(served, version, expected, 422, "weights_refused", found, f"expected {expected}", "Another run")
