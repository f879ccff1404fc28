"""One replica on two nodes: two processes on one machine, with the arguments that the chart's LeaderWorkerSet sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.generators import Generator, running
from support.models import make_tiny_model
from support.ports import free_port
from support.reference_policy import ReferencePolicy
from support.served import PROMPTS
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

pytestmark = [pytest.mark.vllm, pytest.mark.alone, pytest.mark.slow]


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Generator, ReferencePolicy]]:
    """The server of the first node, and the policy that is published to it."""
    # Both processes share the same cores, and their threads would wait for each other.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = make_tiny_model(tmp_path / "model", initializer_range=0.3)
    weights = tmp_path / "weights"
    nodes = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1"]
    nodes += ["--master-port", str(free_port()), "--node-rank"]
    worker = Generator("vllm", model, weights, *nodes, "1", "--headless", log=tmp_path / "worker.log")
    try:
        with running("vllm", model, weights, *nodes, "0", log=tmp_path / "leader.log") as leader:
            yield leader, ReferencePolicy(model, WeightStore(weights))
    finally:
        worker.kill()


def test_weights_reach_the_workers_of_every_node(two_nodes: tuple[Generator, ReferencePolicy]) -> None:
    leader, policy = two_nodes
    prompt = list(PROMPTS[0].token_ids)

    def greedy() -> list[int]:
        (group,) = leader.rollouts(PROMPTS[0], max_tokens=8, temperature=0.0, ignore_eos=True)
        return list(group.completions[0].token_ids)

    assert greedy() == policy.greedy(prompt, 8)
    version = Version(1, 1)
    policy.change(1)
    answer = leader.put(version, policy.publish(version))
    assert answer.status_code == 200, answer.text
    assert greedy() == policy.greedy(prompt, 8)
    assert leader.client.get("/info").json()["world_size"] == 2
