"""One replica on two nodes: two processes on one machine, with the arguments that the chart's LeaderWorkerSet sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.generators import Generator, running
from support.models import make_tiny_model
from support.ports import free_port
from support.reference_policy import ReferencePolicy
from support.served import PROMPTS
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

pytestmark = [pytest.mark.vllm, pytest.mark.alone, pytest.mark.slow]

V1, BROKEN, V3 = Version(1, 1), Version(2, 1), Version(3, 1)
BREAKS = f"""
from vllm.distributed.parallel_state import get_world_group
from tandem_generator.volume_engine import VolumeWeightEngine

def register():
    load = VolumeWeightEngine._source

    def source(self, shards):
        tensors = load(self, shards)
        if any("{BROKEN.step:06d}.{BROKEN.attempt}" in path for path in shards) and get_world_group().rank == 1:
            yield next(iter(tensors))
            raise OSError("the volume is gone")
        yield from tensors

    VolumeWeightEngine._source = source
"""


def break_on_the_second_node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a plug-in of vLLM with which the worker of the second node fails to load BROKEN, after one tensor."""
    metadata = folder / "breaks-1.dist-info"
    metadata.mkdir(parents=True)
    (folder / "breaks.py").write_text(BREAKS)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: breaks\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nbreaks = breaks:register\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)])))
    monkeypatch.setenv("VLLM_PLUGINS", "breaks")


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Generator, ReferencePolicy]]:
    """The server of the first node, and the policy that is published to it."""
    break_on_the_second_node(tmp_path / "breaks", monkeypatch)
    # Both processes share the same cores, and their threads would wait for each other.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = make_tiny_model(tmp_path / "model", initializer_range=0.3)
    weights = tmp_path / "weights"
    nodes = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1"]
    nodes += ["--master-port", str(free_port()), "--node-rank"]
    worker = Generator("vllm", model, weights, *nodes, "1", "--headless", log=tmp_path / "worker.log")
    try:
        with running("vllm", model, weights, *nodes, "0", log=tmp_path / "leader.log", forks=False) as leader:
            yield leader, ReferencePolicy(model, WeightStore(weights))
    finally:
        worker.kill()


def test_weights_reach_the_workers_of_every_node_and_a_load_that_fails_on_one_is_rolled_back_on_all(
    two_nodes: tuple[Generator, ReferencePolicy],
) -> None:
    leader, policy = two_nodes
    prompt = list(PROMPTS[0].token_ids)

    def greedy() -> list[int]:
        (group,) = leader.rollouts(PROMPTS[0], max_tokens=8, temperature=0.0, ignore_eos=True)
        return list(group.completions[0].token_ids)

    def publish(version: Version) -> httpx.Response:
        policy.change(version.step)
        return leader.put(version, policy.publish(version))

    assert greedy() == policy.greedy(prompt, 8)
    answer = publish(V1)
    assert answer.status_code == 200, answer.text
    of_v1 = policy.greedy(prompt, 8)
    assert greedy() == of_v1
    answer = publish(BROKEN)
    assert (answer.status_code, answer.json()["code"]) == (503, "switch_failed"), answer.text
    assert "(the volume is gone); version 1.1 was loaded again" in answer.json()["message"]
    assert policy.greedy(prompt, 8) != of_v1
    assert greedy() == of_v1
    answer = publish(V3)
    assert answer.status_code == 200, answer.text
    assert greedy() == policy.greedy(prompt, 8)
    assert leader.client.get("/info").json()["world_size"] == 2
