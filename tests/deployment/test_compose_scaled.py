"""Two trainer processes and two generator replicas under compose, with the mock generator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.replicas import metric, reach, wait_for
from support.stack import Stack, set_steps

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("mock_images")]


@pytest.fixture
def scaled(project: Path) -> Iterator[Stack]:
    """A run that trains until it is stopped, with two trainer processes and two generators."""
    set_steps(project, 1_000_000)
    with Stack(project, replicas=2, processes=2) as made:
        yield made


def test_a_replica_that_was_killed_catches_up_and_no_step_is_lost(scaled: Stack) -> None:
    one, two = scaled.containers("generator")
    for replica in (one, two):
        reach(replica, step=3)
    two.kill()
    before = metric(one, "tandem_weight_step")
    reach(one, step=before + 3)
    two.start()
    reach(two, step=metric(one, "tandem_weight_step") + 3)
    completions = metric(two, "tandem_rollout_completions_total")
    reach(two, step=metric(one, "tandem_weight_step") + 3)
    wait_for(two, "tandem_rollout_completions_total", at_least=completions + 1)  # it rests for up to 5 s
    processes = scaled.must("top", "trainer")
    assert processes.count("-m tandem_trainer --config") >= 2, processes

    scaled.must("stop", "trainer")
    records = scaled.metrics()
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert {record["version"] for record in records} == {f"{step}.1" for step in range(1, len(records) + 1)}
    for replica in (one, two):
        assert metric(replica, "tandem_weight_step") == len(records), "each replica serves the last policy"
