"""The init containers of the chart run for real: how a stop ends them, and volumes that they may not write to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import podman
from support.helm import CHART, Object, render
from support.podman import Cluster, cluster
from support.pods import Pod, lift

pytestmark = [pytest.mark.docker, pytest.mark.helm, pytest.mark.podman]

TIMEOUT_S = 120.0
GRACE_S = 60
STOPPED = 143
"""128 + SIGTERM: podFailurePolicy ignores it. A container that ignores the signal is killed, and ends with 137."""
PREPARE = "import time; print('preparing', flush=True); time.sleep(600)"
CONFIG = {"shared": {"model": "m"}, "trainer": {"max_steps": 1, "rewards": [{"function": "r:f"}]}}


@pytest.fixture
def made(mock_pods: None) -> Iterator[Cluster]:
    with cluster() as found:
        yield found


def rendered() -> list[Object]:
    return render({"config": CONFIG, "project": {"files": {"prepare.py": PREPARE}}}, of=CHART / "ci/mock-values.yaml")


def pod_of(objects: list[Object], component: str) -> Pod:
    return next(pod for pod in lift(objects) if pod.component == component)


def start(made: Cluster, objects: list[Object], pod: Pod) -> str:
    """Start a pod's only init container."""
    (init,) = pod.inits
    return made.start_init(pod, objects, init)


def stop(container: str) -> int:
    podman.podman("stop", "--time", str(GRACE_S), container, timeout_s=2 * GRACE_S)
    return int(podman.podman("wait", container))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.1)


def wait_for_log(container: str, text: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while text not in podman.logs(container):
        assert time.monotonic() < deadline, podman.logs(container)
        time.sleep(0.1)


def test_a_stop_ends_the_preparation_and_the_pod_that_waits_for_its_lock(made: Cluster) -> None:
    objects = rendered()
    trainer = pod_of(objects, "trainer")
    preparing = start(made, objects, trainer)
    wait_for_log(preparing, "preparing\n")
    (init,) = trainer.inits
    other = Pod("other", trainer.template, trainer.restart, ())
    waiting = made.start_init(other, objects, init)
    assert "preparing" not in podman.logs(waiting)
    assert stop(waiting) == STOPPED
    assert stop(preparing) == STOPPED
    assert not made.folder("run-tandem-cache", "projects/run-tandem/.prepared").exists()


def test_a_stop_ends_a_generator_that_waits_for_the_project(made: Cluster) -> None:
    objects = rendered()
    container = start(made, objects, pod_of(objects, "generator"))
    wait_for(made.folder("run-tandem-weights", "served"))
    assert stop(container) == STOPPED


@pytest.mark.parametrize(
    ("component", "volume"), [("trainer", "runs"), ("trainer", "weights"), ("generator", "weights")]
)
def test_a_volume_that_ignores_fs_group_is_named_with_the_user_and_the_fix(
    made: Cluster, component: str, volume: str
) -> None:
    made.claim(f"run-tandem-{volume}", group=0)  # as NFS leaves it: root's
    objects = rendered()
    container = start(made, objects, pod_of(objects, component))
    assert made.exit_code(container, TIMEOUT_S) == 1
    log = podman.logs(container)
    assert f'error: /{volume} (owner 0:0, mode 755): got "Permission denied"' in log
    assert "user 10001" in log
    assert "chown 10001:10001" in log
