"""The weights volume becomes full, or is mounted again and is empty, while versions are published behind updates."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.projects import Project
from tandem_protocol.store import WeightStore

TIMEOUT_S = 60.0
OPTIONS = ("--generator.mock.faults.latency_s", "0.05", "--visible-timeout-s", "2")
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "delta": {"publish": {"delta": "always"}, "learner": {"dtype": "bfloat16"}, "optim": {"learning_rate": 5e-6}},
}
Mount = Callable[[Path], None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mounts an empty volume of 2 MiB over what is at a path."""
    mounted: list[Path] = []

    def mount(path: Path) -> None:
        command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tandem-test", str(path)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the permission to mount a small file system")
        mounted.append(path)

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def weights(project: Project) -> Path:
    return project.directory.parent / "weights"


def train_disturbed(project: Project, disturb: Callable[[], None], **env: str) -> subprocess.CompletedProcess[str]:
    """Run the trainer, and disturb it after its third step."""
    metrics = project.run_dir / "metrics.jsonl"

    def wait_and_disturb() -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        disturb()

    thread = threading.Thread(target=wait_and_disturb)
    thread.start()
    ended = project.train(ranks=1, **env)
    thread.join()
    print(ended.stderr)
    assert "Traceback" not in ended.stderr
    return ended


def assert_nothing_is_lost(project: Project) -> None:
    store = WeightStore(weights(project))
    assert project.steps == [*range(1, 21)]
    assert project.generator.served.version == store.latest()
    assert (store.latest() or store.versions()[-1]).step == 20
    for version in store.versions():
        store.verify(store.read(version)[0])
    assert not [*(store.root / "versions").glob(".*")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_weights_volume_is_full_ends_with_the_fix_and_goes_on_when_there_is_space(
    make_project: Callable[..., Project], mount: Mount, kind: str
) -> None:
    project = make_project(faults=OPTIONS, max_steps=20, max_lag=1, **KINDS[kind])
    mount(weights(project))
    filler = weights(project) / "filler"

    def fill() -> None:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    ended = train_disturbed(project, fill, TANDEM_TRAINER_RETRIES="0")
    assert ended.returncode == 1
    assert "cannot publish version" in ended.stderr
    assert "enlarge the weights volume" in ended.stderr
    assert 3 <= project.steps[-1] < 20
    filler.unlink()
    assert project.train().returncode == 0
    assert_nothing_is_lost(project)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_weights_volume_is_mounted_again_empty_goes_on_by_itself(
    make_project: Callable[..., Project], mount: Mount, kind: str
) -> None:
    project = make_project(faults=OPTIONS, max_steps=20, max_lag=1, **KINDS[kind])
    mount(weights(project))
    store = WeightStore(weights(project))

    def mount_again() -> None:
        """Do it while no version is loaded: a generator that loses two versions ends, and nothing restarts it here."""
        deadline = time.monotonic() + TIMEOUT_S
        while project.generator.served.version != store.latest():
            assert time.monotonic() < deadline
        mount(weights(project))

    ended = train_disturbed(project, mount_again, TANDEM_TRAINER_RETRIES="2")
    assert ended.returncode == 0
    said = ("cannot publish version", "is not the file that this trainer has locked", "any more, so no generator")
    assert any(words in ended.stderr for words in said), "by the moment of the publish"
    assert "starting it again" in ended.stderr
    assert_nothing_is_lost(project)
