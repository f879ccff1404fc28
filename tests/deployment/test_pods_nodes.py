"""A trainer on two nodes is one run: its pods end and come back together, whichever of them is stopped or lost.

podman plays the pods. The Job's controller, which replaces them, is played by the test.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from support.helm import CHART, Object, render
from support.podman import cluster, podman
from support.runs import Run, results

pytestmark = [pytest.mark.docker, pytest.mark.helm, pytest.mark.podman]

TIMEOUT_S = 120.0
END_TOGETHER_S = 60.0
"""Within this time, all pods have ended after one was stopped or lost. A rendezvous alone would wait 901 s."""
STOPPED = 143
STEPS = 24


def rendered() -> list[Object]:
    trainer = {"max_lag": 0, "max_steps": STEPS, "checkpoint": {"every_steps": 4}, "eval": None}
    storage = {name: {"accessMode": "ReadWriteMany"} for name in ("weights", "cache", "runs")}
    values = {"config": {"trainer": trainer}, "generator": {"replicas": 1}, "trainer": {"nodes": 2}, "storage": storage}
    return render(values, of=CHART / "ci/mock-values.yaml")


@pytest.fixture(scope="module")
def uninterrupted(mock_pods: None) -> Iterator[Run]:
    with cluster() as made:
        run = Run(made, rendered())
        run.start(timeout_s=TIMEOUT_S)
        assert run.end(timeout_s=TIMEOUT_S) == [0, 0], run.logs()
        yield run


def test_two_nodes_are_one_run(uninterrupted: Run) -> None:
    assert [line["step"] for line in uninterrupted.metrics()] == list(range(1, STEPS + 1))
    parts = {path.name.partition(".")[0] for path in uninterrupted.checkpoint(STEPS).glob("rollouts-*")}
    assert parts == {"rollouts-0", "rollouts-1"}


def test_both_pods_end_and_come_back_together_and_the_run_goes_on_bit_for_bit(uninterrupted: Run) -> None:
    with cluster() as made:
        run = Run(made, rendered())
        run.start(timeout_s=TIMEOUT_S)
        run.reach(3)
        send(run, 1, signal.SIGTERM)
        assert run.end(timeout_s=END_TOGETHER_S) == [STOPPED, STOPPED], run.logs()
        assert run.checkpoint(len(run.metrics())).exists(), "no step is lost"

        for lost, other in ((0, 1), (1, 0)):
            come_back(run)
            run.reach(len(run.metrics()) + 2)
            send(run, lost, signal.SIGKILL)
            status = run.end(timeout_s=END_TOGETHER_S)
            assert status[lost] == 137, run.logs()
            assert status[other] not in (0, STOPPED), "the Job counts it, and replaces both"

        come_back(run)
        assert run.end(timeout_s=TIMEOUT_S) == [0, 0], run.logs()
        assert results(run) == results(uninterrupted)


def send(run: Run, index: int, number: int) -> None:
    """Send a signal to PID 1 of a trainer's pod. If PID 1 is killed, the kernel kills all processes of the pod."""
    os.kill(run.cluster.inspect(run.trainers[index])["State"]["Pid"], number)


def come_back(run: Run) -> None:
    for trainer in run.trainers:
        podman("start", run.cluster.container(trainer))
