"""Each service gets its own GPUs and sees no other. Eight harmless device nodes take the place of GPUs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
import yaml

from support.gpus import cdi_gpus
from support.stack import ROOT, Stack

pytestmark = [pytest.mark.docker, pytest.mark.cdi]

SERVICES = ("generator", "trainer")
DEVICES = "from pathlib import Path; print(*sorted(path.name for path in Path('/dev').glob('nvidia*')))"

FIRST_STEP = """
import pathlib, time
deadline = time.monotonic() + 120
while not (path := pathlib.Path("/runs/default/metrics.jsonl")).exists() or not path.read_text():
    assert time.monotonic() < deadline, "no step within 120 s"
    time.sleep(0.2)
"""


@pytest.fixture
def gpu_host() -> Iterator[None]:
    """Declare `nvidia.com/gpu=0` to `7` to the Docker engine during the test."""
    info = docker.from_env(timeout=60).info()
    with cdi_gpus(Path(info["CDISpecDirs"][0])):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with Tandem's compose files, in which a test can write its own .env."""
    folder = tmp_path / "tandem"
    folder.mkdir()
    for name in ("compose.yaml", "compose.gpu.yaml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def wide_project(project: Path) -> Path:
    """A project that trains until it is stopped, with enough prompts for four ranks."""
    path = project / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["trainer"] |= {"max_steps": 1_000_000, "rollout": config["trainer"]["rollout"] | {"num_prompts": 4}}
    path.write_text(yaml.safe_dump(config))
    return project


class GpuStack(Stack):
    """The stack that `docker compose up` starts in `folder`, with images that need no GPU."""

    files = ()

    def __init__(self, folder: Path, project: Path, **variables: str) -> None:
        super().__init__(project, checkout=folder, variables={"TANDEM_TRAINER_TARGET": "cpu", **variables})


def tandem_gpus(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tandem_cli", "gpus", "--driver", "cdi", "--directory", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)


@pytest.mark.usefixtures("gpu_host", "mock_images")
def test_each_service_sees_only_its_own_gpus(folder: Path, wide_project: Path) -> None:
    sets = ("--generator", "0-3", "--trainer", "4-7", "--tensor-parallel", "2", "--project", str(wide_project))
    done = tandem_gpus(folder, *sets)
    assert (done.returncode, done.stderr) == (0, ""), "everything could be checked"
    with GpuStack(folder, wide_project) as made:
        assert made.python("generator", DEVICES).split() == [f"nvidia{index}" for index in range(4)]
        assert made.python("trainer", DEVICES).split() == [f"nvidia{index}" for index in range(4, 8)]
        made.python("trainer", FIRST_STEP)
        ranks = [line for line in made.must("top", "trainer").splitlines() if "-m tandem_trainer --config" in line]
        assert len([line for line in ranks if "accelerate" not in line]) == 4, ranks


@pytest.mark.usefixtures("gpu_host")
def test_docker_compose_uses_the_devices_of_the_written_file_only(folder: Path, project: Path) -> None:
    done = tandem_gpus(folder, "--generator", "0,1", "--trainer", "nvidia.com/gpu=7", "--project", str(project))
    assert done.returncode == 0, done.stderr
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TANDEM_", "COMPOSE_"))}
    merged = ["docker", "compose", "config", "--format", "json"]
    services = json.loads(subprocess.run(merged, cwd=folder, env=env, capture_output=True, check=True).stdout)[
        "services"
    ]
    reserved = {name: services[name]["deploy"]["resources"]["reservations"]["devices"] for name in SERVICES}
    assert {name: [one["device_ids"] for one in devices] for name, devices in reserved.items()} == {
        "generator": [["nvidia.com/gpu=0", "nvidia.com/gpu=1"]],
        "trainer": [["nvidia.com/gpu=7"]],
    }
    assert services["preflight"]["volumes"][0]["source"] == str(project)
    assert services["generator"]["environment"]["TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE"] == "2"
    assert services["trainer"]["environment"]["TANDEM_TRAINER_PROCESSES"] == "1"
    for name in SERVICES:
        assert services[name]["image"] == f"tandem-{name}:cuda"
        assert "cpuset" not in services[name], "services with GPUs may use every core"


@pytest.mark.usefixtures("gpu_host")
@pytest.mark.parametrize(
    ("generator", "trainer", "words"),
    [
        ("0-4", "4-7", "which share nvidia.com/gpu=4, expected disjoint sets"),
        ("0-3", "8", "--trainer: got nvidia.com/gpu=8, expected devices from this list: nvidia.com/gpu=0, "),
        ("0-2", "4", "has 2 attention heads, expected a divisor of 2. Fix: --tensor-parallel 1,"),
    ],
)
def test_invalid_sets_are_refused(folder: Path, project: Path, generator: str, trainer: str, words: str) -> None:
    done = tandem_gpus(folder, "--generator", generator, "--trainer", trainer, "--project", str(project))
    assert done.returncode == 2
    assert words in done.stderr
    assert not (folder / ".env").exists()


@pytest.mark.usefixtures("mock_images")
def test_one_gpu_for_both_services_is_refused(folder: Path, project: Path) -> None:
    (folder / ".env").write_text("COMPOSE_FILE=compose.yaml:compose.gpu.yaml\n")
    made = GpuStack(folder, project, TANDEM_GENERATOR_GPU="1", TANDEM_TRAINER_GPU="1")
    try:
        made.must("up", "--no-build", "preflight")  # this host has no GPU for the others, which report the message
        assert "got the GPUs 1 for the generator and 1 for the trainer, which share 1" in made.logs("preflight")
    finally:
        made.stop()
