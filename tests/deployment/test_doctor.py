"""`tandem doctor` on a real Docker engine, for a stack that can run and for stacks that cannot."""

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
from tandem_cli.testing import TRAINER_IMAGE
from tandem_protocol.device_sets import CDI_KIND

pytestmark = pytest.mark.docker

NO_REVISION = "image versions"
"""The check that warns because the tests build their images without TANDEM_REVISION."""


class Findings(NamedTuple):
    code: int
    status: dict[str, str]
    message: dict[str, str]

    @property
    def failed(self) -> set[str]:
        return {name for name, status in self.status.items() if status == "fail"}


class DoctorRuns:
    """Runs the doctor on a stack of this checkout."""

    def __init__(self, made: Stack, project: Path, folder: Path) -> None:
        self.stack = made
        self._project = project
        self._override = folder / "override.yaml"

    def examine(self, override: str = "{}", **env: str) -> Findings:
        """Run the doctor with an additional compose file and variables, and return its findings."""
        self._override.write_text(override)
        done = subprocess.run(
            [sys.executable, "-m", "tandem_cli", "doctor", "--json", "--project", str(self._project)],
            cwd=ROOT,
            env={
                **os.environ,
                "COMPOSE_PROJECT_NAME": self.stack.name,
                "COMPOSE_FILE": f"compose.yaml:{self._override}",
                "TANDEM_GENERATOR_TARGET": "mock",
                "TANDEM_TRAINER_IMAGE": TRAINER_IMAGE,
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
        return Findings(done.returncode, status, message)


@pytest.fixture
def doctor(mock_images: None, project: Path, tmp_path: Path) -> Iterator[DoctorRuns]:
    with stack(project) as made:
        yield DoctorRuns(made, project, tmp_path)


def test_a_stack_that_can_run_passes_with_a_warning_about_the_revision(doctor: DoctorRuns) -> None:
    found = doctor.examine()
    assert {name for name, status in found.status.items() if status != "ok"} <= {NO_REVISION}
    assert found.code == 0
    assert found.message["generator fits"] == "the mock engine holds no model"
    assert "not tried" in found.message["weights access"]


def test_the_services_users_try_the_volumes_of_a_stack(doctor: DoctorRuns) -> None:
    doctor.stack.must("create", "--no-build")
    assert doctor.examine().message["weights access"] == "tried: the trainer can write, the generator can read"


def test_a_volume_that_only_root_can_use_fails_when_it_is_tried(doctor: DoctorRuns, tmp_path: Path) -> None:
    roots = yaml.safe_dump({"volumes": {"weights": {"driver_opts": {"o": "size=64m,mode=0700"}}}})
    (tmp_path / "roots.yaml").write_text(roots)
    doctor.stack.must("--file", str(tmp_path / "roots.yaml"), "create", "--no-build")
    found = doctor.examine(roots)
    assert found.failed == {"weights access"}
    assert "Permission denied" in found.message["weights access"]
    assert found.code == 1


def test_an_existing_volume_counts_with_the_size_it_was_created_with(doctor: DoctorRuns, tmp_path: Path) -> None:
    small = yaml.safe_dump({"volumes": {"weights": {"driver_opts": {"o": "size=100k,uid=10001,gid=10001"}}}})
    (tmp_path / "small.yaml").write_text(small)
    doctor.stack.must("--file", str(tmp_path / "small.yaml"), "create", "--no-build")
    found = doctor.examine(TANDEM_WEIGHTS_SIZE="2g")
    assert found.failed == {"weight store"}
    assert "2.0 GiB is configured now" in found.message["weight store"]


def test_the_model_of_prepare_py_is_found_on_its_volume(doctor: DoctorRuns, project: Path) -> None:
    doctor.stack.must("up", "--no-build", "preflight")
    (project / "model").rename(project.parent / "model")
    found = doctor.examine()
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
def test_each_fault_fails_exactly_one_check(doctor: DoctorRuns, env: dict[str, str], check: str) -> None:
    found = doctor.examine(**env)
    assert (found.failed, found.code) == ({check}, 1)


def test_images_that_are_not_built_yet_give_a_warning(doctor: DoctorRuns) -> None:
    found = doctor.examine(TANDEM_TRAINER_TARGET="unbuilt")
    assert found.status["images"] == "warn"
    assert found.failed == set()


def test_a_port_that_another_process_uses_fails(doctor: DoctorRuns) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        published = f"services: {{generator: {{ports: ['127.0.0.1:{port}:8000']}}}}"
        assert doctor.examine(published).failed == {"ports"}
    assert doctor.examine(published).status["ports"] == "ok"


def reserving(driver: str, **devices: list[str]) -> str:
    """Return a compose file that reserves GPUs for each service."""
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


def test_shared_gpus_of_the_merged_configuration_fail_even_if_they_do_not_exist(doctor: DoctorRuns) -> None:
    found = doctor.examine(reserving("nvidia", generator=["0", "1"], trainer=["1"]))
    assert {"GPU sets", "GPU access"} <= found.failed
    assert "share 1" in found.message["GPU sets"]


@pytest.mark.cdi
def test_only_devices_of_this_engine_are_allowed(doctor: DoctorRuns) -> None:
    def examine(*trainer: str) -> Findings:
        names = [f"{CDI_KIND}{name}" for name in trainer]
        return doctor.examine(reserving("cdi", generator=[f"{CDI_KIND}0", f"{CDI_KIND}1"], trainer=names))

    with cdi_gpus(Path(doctor.stack.engine.info()["CDISpecDirs"][0])):
        valid = examine("4", "5")
        shared = examine("1", "2")
        missing = examine("8")
    assert (valid.failed, valid.status["GPU ids"], valid.status["GPU sets"]) == (set(), "ok", "ok")
    assert shared.failed == {"GPU sets"}
    assert missing.failed == {"GPU ids"}
    assert "GPU access" in examine("4").failed, "the engine has no device any more"
