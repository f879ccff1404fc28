"""`tandem doctor` on a real engine: what it says of a sound stack, and of one that cannot work."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from support.gpus import cdi_gpus
from support.stack import ROOT, Stack, stack
from tandem_protocol.device_sets import CDI_KIND

pytestmark = pytest.mark.docker

NOT_TOLD = "image versions"
"""A warning where the images were built without TANDEM_REVISION, as the tests' are."""


class Examination(NamedTuple):
    code: int
    status: dict[str, str]
    message: dict[str, str]

    @property
    def failed(self) -> set[str]:
        return {name for name, status in self.status.items() if status == "fail"}


class Patient:
    """A stack, as `docker compose` in this checkout would see it."""

    def __init__(self, made: Stack, project: Path, folder: Path) -> None:
        self.stack, self._project, self._override = made, project, folder / "override.yaml"

    def examine(self, override: str = "{}", **env: str) -> Examination:
        """What the doctor finds with another compose file and variables."""
        self._override.write_text(override)
        done = subprocess.run(
            [sys.executable, "-m", "tandem_cli", "doctor", "--json", "--project", str(self._project)],
            cwd=ROOT,
            env={
                **os.environ,
                "COMPOSE_PROJECT_NAME": self.stack.name,
                "COMPOSE_FILE": f"compose.yaml:{self._override}",
                "TANDEM_GENERATOR_TARGET": "mock",
                **env,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not done.stderr
        findings = json.loads(done.stdout)
        assert all(finding["fix"] for finding in findings if finding["status"] == "fail")
        status, message = ({finding["name"]: finding[key] for finding in findings} for key in ("status", "message"))
        return Examination(done.returncode, status, message)


@pytest.fixture
def patient(mock_images: None, project: Path, tmp_path: Path) -> Iterator[Patient]:
    with stack(project) as made:
        yield Patient(made, project, tmp_path)


def test_a_stack_that_would_run_gets_no_fail_and_only_a_warning_that_is_justified(patient: Patient) -> None:
    found = patient.examine()
    assert {name for name, status in found.status.items() if status != "ok"} <= {NOT_TOLD}
    assert found.code == 0
    assert found.message["generator fits"] == "the mock engine holds no model"
    assert "not tried" in found.message["weights access"]


def test_the_volumes_of_a_stack_are_tried_by_its_services_users(patient: Patient) -> None:
    patient.stack.must("create", "--no-build")
    assert patient.examine().message["weights access"] == "tried: the trainer writes, the generator reads"


def test_a_volume_that_is_roots_alone_is_found_by_trial(patient: Patient, tmp_path: Path) -> None:
    roots = yaml.safe_dump({"volumes": {"weights": {"driver_opts": {"o": "size=64m,mode=0700"}}}})
    (tmp_path / "roots.yaml").write_text(roots)
    patient.stack.must("--file", str(tmp_path / "roots.yaml"), "create", "--no-build")
    found = patient.examine(roots)
    assert found.failed == {"weights access"}
    assert "Permission denied" in found.message["weights access"]
    assert found.code == 1


def test_a_volume_that_was_made_counts_as_it_was_made(patient: Patient, tmp_path: Path) -> None:
    small = yaml.safe_dump({"volumes": {"weights": {"driver_opts": {"o": "size=100k,uid=10001,gid=10001"}}}})
    (tmp_path / "small.yaml").write_text(small)
    patient.stack.must("--file", str(tmp_path / "small.yaml"), "create", "--no-build")
    found = patient.examine(TANDEM_WEIGHTS_SIZE="2g")
    assert found.failed == {"weight store"}
    assert "(now 2.0 GiB is configured)" in found.message["weight store"]


def test_the_model_that_prepare_made_is_found_on_its_volume(patient: Patient, project: Path) -> None:
    patient.stack.must("up", "--no-build", "preflight")
    (project / "model").rename(project.parent / "model")
    found = patient.examine()
    assert found.message["model"].endswith("in the volume at /project/model")
    assert found.status["disk"] == "ok"


@pytest.mark.parametrize(
    ("env", "check"),
    [
        ({"TANDEM_TRAINER_CPUS": "0"}, "CPU sets"),
        ({"TANDEM_WEIGHTS_SIZE": "900000g"}, "host memory"),
        ({"TANDEM_WEIGHTS_SIZE": "100k"}, "weight store"),
        ({"DOCKER_HOST": "unix:///nonexistent"}, "engine"),
        ({"COMPOSE_FILE": "nowhere.yaml"}, "configuration"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_fails_one_check(patient: Patient, env: dict[str, str], check: str) -> None:
    found = patient.examine(**env)
    assert (found.failed, found.code) == ({check}, 1)


def test_images_that_are_not_built_yet_are_no_failure(patient: Patient) -> None:
    found = patient.examine(TANDEM_TRAINER_TARGET="unbuilt")
    assert found.status["images"] == "warn"
    assert found.failed == set()


def test_a_port_that_another_process_has_fails(patient: Patient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        published = f"services: {{generator: {{ports: ['127.0.0.1:{port}:8000']}}}}"
        assert patient.examine(published).failed == {"ports"}
    assert patient.examine(published).status["ports"] == "ok"


def reserving(driver: str, **devices: list[str]) -> str:
    """A compose file that gives each service its GPUs."""
    return yaml.safe_dump(
        {
            "services": {
                name: {"deploy": {"resources": {"reservations": {"devices": [
                    {"driver": driver, "device_ids": ids, "capabilities": ["gpu"]}
                ]}}}}
                for name, ids in devices.items()
            }
        }
    )  # fmt: skip


def test_gpus_are_compared_in_the_merged_configuration_whether_they_exist_or_not(patient: Patient) -> None:
    found = patient.examine(reserving("nvidia", generator=["0", "1"], trainer=["1"]))
    assert {"GPU sets", "GPU access"} <= found.failed
    assert "share 1" in found.message["GPU sets"]


@pytest.mark.cdi
def test_only_devices_that_this_engine_hands_out_are_allowed(patient: Patient) -> None:
    def examine(*trainer: str) -> Examination:
        names = [f"{CDI_KIND}{name}" for name in trainer]
        return patient.examine(reserving("cdi", generator=[f"{CDI_KIND}0", f"{CDI_KIND}1"], trainer=names))

    with cdi_gpus(Path(patient.stack.engine.info()["CDISpecDirs"][0])):
        sound, shared, missing = examine("4", "5"), examine("1", "2"), examine("8")
    assert (sound.failed, sound.status["GPU ids"], sound.status["GPU sets"]) == (set(), "ok", "ok")
    assert shared.failed == {"GPU sets"}
    assert missing.failed == {"GPU ids"}
    assert "GPU access" in examine("4").failed, "nobody hands out a device any more"
