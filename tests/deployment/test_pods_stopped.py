"""A trainer's pod that gets SIGTERM in any phase ends with 143, and the run goes on as if it had not been stopped.

podman plays the pod. SIGTERM to PID 1 is what kubelet sends for a drain, an eviction and `kubectl delete pod`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from support import podman
from support.helm import CHART, Object, render
from support.phases import child_of, frozen_in, status_of
from support.podman import cluster
from support.runs import Run, results

pytestmark = [pytest.mark.docker, pytest.mark.helm, pytest.mark.podman]

TIMEOUT_S = 120.0
STOPPED = 143
STEPS = 40
PHASES = ("wait_for_rollouts", "update", "publish", "evaluate", "checkpoint")
"""The phases of a step. Two more tests stop the trainer before its first step."""


def rendered() -> list[Object]:
    trainer = {"max_lag": 0, "max_steps": STEPS, "checkpoint": {"every_steps": 3}, "eval": {"every_steps": 2}}
    values = {"config": {"trainer": trainer}, "generator": {"replicas": 1}}
    return render(values, of=CHART / "ci/mock-values.yaml")


@pytest.fixture(scope="module")
def uninterrupted(mock_pods: None) -> Iterator[Run]:
    with cluster() as made:
        run = Run(made, rendered())
        run.start(timeout_s=TIMEOUT_S)
        assert run.end(timeout_s=TIMEOUT_S) == [0], run.logs()
        yield run


@pytest.fixture(scope="module")
def stopped(mock_pods: None) -> Iterator[Run]:
    """A run that each test stops once. It has no generator in the beginning."""
    with cluster() as made:
        yield Run(made, rendered())


def terminate(run: Run) -> None:
    (trainer,) = run.trainers
    os.kill(run.cluster.inspect(trainer)["State"]["Pid"], signal.SIGTERM)


def ends_stopped(run: Run) -> bool:
    """Wait until the trainer ends, and return whether its status is that of a stopped run, and so is status.json."""
    (trainer,) = run.trainers
    status = run.cluster.wait(trainer, timeout_s=TIMEOUT_S)
    assert "Traceback" not in run.cluster.logs(trainer)
    return (status, status_of(run.run_dir)["phase"]) == (STOPPED, "stopped")


def go_on(run: Run) -> None:
    """Start the trainer's container again, in the same pod: the pod's init container has its own tests."""
    (trainer,) = run.trainers
    podman.podman("start", run.cluster.container(trainer))


def checkpoints(run: Run) -> list[int]:
    return sorted(int(path.name) for path in (run.run_dir / "checkpoints").glob("0*"))


def test_in_prepare(stopped: Run) -> None:
    (trainer,) = stopped.trainers
    (init,) = trainer.inits
    container = stopped.cluster.start_init(trainer, stopped.objects, init)
    deadline = time.monotonic() + TIMEOUT_S
    while "preparing the project with its prepare.py" not in podman.logs(container):
        assert time.monotonic() < deadline, podman.logs(container)
        time.sleep(0.05)
    podman.podman("stop", "--time", "60", container, timeout_s=TIMEOUT_S)
    assert stopped.cluster.exit_code(container, TIMEOUT_S) == STOPPED
    assert not stopped.cluster.folder("run-tandem-cache", "projects/run-tandem/.prepared").exists()
    podman.podman("pod", "rm", "--force", stopped.cluster.own(f"{trainer.name}-{init['name']}"))


def test_while_it_waits_for_generators(stopped: Run) -> None:
    stopped.start_trainers(timeout_s=TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while status_of(stopped.run_dir)["phase"] != "wait_for_generators":
        assert time.monotonic() < deadline, stopped.logs()
        time.sleep(0.05)
    terminate(stopped)
    assert ends_stopped(stopped)
    assert not checkpoints(stopped), "no step was done"
    stopped.cluster.play(stopped.objects, stopped.generators, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("phase", PHASES)
def test_in_a_phase_of_a_step(stopped: Run, phase: str) -> None:
    go_on(stopped)
    (trainer,) = stopped.trainers
    process = child_of(stopped.cluster.inspect(trainer)["State"]["Pid"])
    with frozen_in(phase, stopped.run_dir, process, after=max(checkpoints(stopped), default=0)) as before:
        terminate(stopped)
    assert ends_stopped(stopped), stopped.logs()
    last = stopped.metrics()[-1]["step"]
    assert last == before + (phase in ("wait_for_rollouts", "update")), "it finishes the step, and begins no other"
    assert checkpoints(stopped)[-1] == last < STEPS


def test_the_run_goes_on_to_the_result_of_an_uninterrupted_run(stopped: Run, uninterrupted: Run) -> None:
    go_on(stopped)
    assert stopped.end(timeout_s=TIMEOUT_S) == [0], stopped.logs()
    assert results(stopped) == results(uninterrupted)
    assert stopped.metrics()[-1]["version"] == f"{STEPS}.{len(PHASES) + 1}", "each stop began another attempt"
