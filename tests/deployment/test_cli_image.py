"""`docker compose run --rm tandem`: the command line in its own small image, on a real Docker engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.stack import ROOT, Stack, stack

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("mock_images")]


@pytest.fixture(scope="module")
def cli_image() -> None:
    Stack().must("build", "tandem", timeout_s=600)


@pytest.fixture
def checkout(cli_image: None, tmp_path: Path) -> Path:
    """A folder with the compose files, which the command may write to."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("compose.yaml", "compose.gpu.yaml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def made(checkout: Path, project: Path) -> Iterator[Stack]:
    with stack(project, checkout=checkout, variables={"PWD": str(checkout)}) as made:
        yield made


def doctor(made: Stack) -> tuple[int, dict[str, dict[str, str]]]:
    done = made.compose("run", "--rm", "--no-TTY", "tandem", "doctor", "--json")
    findings = json.loads(done.stdout[done.stdout.index("[\n") :])  # compose says first what it creates
    return done.returncode, {finding["name"]: finding for finding in findings}


def test_the_doctor_in_a_container_knows_what_the_doctor_on_the_host_knows(made: Stack, project: Path) -> None:
    code, found = doctor(made)
    assert (code, [name for name, finding in found.items() if finding["status"] == "fail"]) == (0, [])
    assert made.name in found["configuration"]["message"]
    assert found["project"]["message"] == "/project: model model, engine mock"
    assert found["model"]["message"].endswith("in the folder /project/model")
    assert {found[name]["status"] for name in ("engine", "compose", "CPU sets", "host memory", "disk", "ports")} == {
        "ok"
    }


def test_the_doctor_in_a_container_uses_the_variables_of_the_shell(checkout: Path, project: Path) -> None:
    variables = {"PWD": str(checkout), "TANDEM_WEIGHTS_SIZE": "100k", "TANDEM_TRAINER_CPUS": "0"}
    with stack(project, checkout=checkout, variables=variables) as made:
        code, found = doctor(made)
    assert code == 1
    assert {name for name, finding in found.items() if finding["status"] == "fail"} == {"CPU sets", "weight store"}


def test_gpus_in_a_container_writes_the_files_of_the_host(made: Stack, checkout: Path) -> None:
    written = ("run", "--rm", "tandem", "gpus", "--generator", "0", "--trainer")
    assert made.compose(*written, "1-3").returncode == 2, "two prompts per step are not for three processes"
    assert not (checkout / "compose.devices.yaml").exists()
    made.must(*written, "1-2")
    assert (checkout / ".env").read_text() == "COMPOSE_FILE=compose.yaml:compose.gpu.yaml:compose.devices.yaml\n"
    assert "TANDEM_TRAINER_PROCESSES" in (checkout / "compose.devices.yaml").read_text()


def test_the_image_has_no_torch(made: Stack) -> None:
    code = "import importlib.util as u; print([n for n in ('torch', 'numpy', 'tandem_trainer') if u.find_spec(n)])"
    printed = made.must("run", "--rm", "--no-TTY", "--entrypoint", "python3", "tandem", "-c", code)
    assert printed.splitlines()[-1] == "[]"
