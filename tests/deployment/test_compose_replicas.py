"""One of two generators is away for long: training goes on with the other one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from docker.models.containers import Container

from support.faults import disconnected
from support.replicas import metric, reach, wait_for
from support.stack import Stack, set_steps

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("mock_images")]


@contextmanager
def killed(_stack: Stack, replica: Container) -> Iterator[None]:
    """The replica's name no longer has its address."""
    replica.kill()
    yield
    replica.start()


@contextmanager
def starting(stack: Stack, replica: Container) -> Iterator[None]:
    """The replica's name has its address, but connections are refused. vLLM takes a minute or more to start."""
    network = stack.engine.networks.get(f"{stack.name}_rl")
    with killed(stack, replica):
        other = stack.engine.containers.create(
            replica.image, ["infinity"], entrypoint="sleep", name=f"{stack.name}-starting"
        )
        try:
            network.connect(other, aliases=["generator"])
            other.start()
            yield
        finally:
            other.remove(force=True)


@pytest.mark.parametrize("away", [killed, starting, disconnected])
def test_training_goes_on_while_a_replica_is_away_and_the_replica_returns_with_the_newest_version(project, away):
    set_steps(project, 1_000_000)
    with Stack(project, replicas=2) as stack:
        one, two = stack.containers("generator")
        for replica in (one, two):
            reach(replica, step=3)
        with away(stack, two):
            reach(one, step=metric(one, "tandem_weight_step") + 10)
            served = metric(one, "tandem_weight_step")
        reach(two, step=served)
        completions = metric(two, "tandem_rollout_completions_total")
        reach(two, step=metric(one, "tandem_weight_step") + 3)
        wait_for(two, "tandem_rollout_completions_total", at_least=completions + 1)  # it rests for up to 5 s
        stack.must("stop", "trainer")
        steps = [line["step"] for line in stack.metrics()]
        assert steps == [*range(1, len(steps) + 1)]
