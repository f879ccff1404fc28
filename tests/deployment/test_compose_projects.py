"""Several projects on one host: each has its packages, its name and its volumes, and none replaces a running one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from docker.errors import ImageNotFound

from support.projects import write_project
from support.stack import ROOT, Stack, set_steps, stack
from tandem_cli.testing import IMAGE_PREFIX, unique_name

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("mock_images")]


@pytest.fixture
def endless(project: Path) -> Iterator[Stack]:
    """A running stack whose trainer trains until it is stopped."""
    set_steps(project, 1_000_000)
    with Stack(project) as made:
        yield made


def make(target: str, project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `make` with the mock generator."""
    return subprocess.run(
        ["make", target, f"PROJECT={project}"],
        cwd=ROOT,
        env={**os.environ, "TANDEM_GENERATOR_TARGET": "mock", **variables},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=300, check=False,
    )  # fmt: skip


def preflight(made: Stack) -> tuple[int, str]:
    """Run the preflight as a part of `up`. Returns its exit status and its log."""
    made.compose("up", "--no-build", "--detach")
    return made.container("preflight").attrs["State"]["ExitCode"], made.logs("preflight")


def test_changed_files_under_running_services_are_reported(endless: Stack, project: Path) -> None:
    running = {name: endless.container(name).id for name in ("trainer", "generator")}
    assert preflight(endless)[0] == 0, "nothing has changed, so there is nothing to prepare"

    (project / "new.txt").touch()
    with (project / "odd_rewards.py").open("a") as rewards:
        rewards.write("# edited")
    status, log = preflight(endless)
    assert status == 2
    assert f"changes in new.txt, odd_rewards.py, but the services of {endless.name} are running" in log

    assert {name: endless.container(name).id for name in running} == running
    assert all(endless.container(name).status == "running" for name in running)
    assert "new.txt" not in endless.must("exec", "-T", "trainer", "ls", "/project")

    endless.must("stop", "--timeout", "30")
    assert preflight(endless)[0] == 0
    assert "new.txt" in endless.must("exec", "-T", "trainer", "ls", "/project")


@pytest.mark.parametrize("killed", ["trainer", "generator"])
def test_the_other_service_alone_keeps_its_files(endless: Stack, project: Path, killed: str) -> None:
    endless.must("kill", killed)
    (project / "new.txt").touch()
    assert preflight(endless)[0] == 2


def test_another_project_does_not_replace_one_that_make_has_started(
    endless: Stack, project: Path, tmp_path: Path
) -> None:
    other = write_project(tmp_path / "other")
    running = {name: endless.container(name).id for name in ("trainer", "generator")}
    up = make("up", other, NAME=endless.name)
    assert up.returncode == 2, up.stdout
    assert f"got the project {other}, but {project} is running under this Compose project" in up.stdout
    assert {name: endless.container(name).id for name in running} == running
    assert all(endless.container(name).status == "running" for name in running)


@pytest.fixture
def own_image(project: Path) -> Iterator[Stack]:
    """A stack whose trainer has an image of its own."""
    image = unique_name()
    with stack(project, variables={"TANDEM_TRAINER_IMAGE": image}) as made:
        yield made
    with suppress(ImageNotFound):
        made.engine.images.remove(f"{image}:cpu")


def test_a_projects_packages_are_in_its_image(own_image: Stack, project: Path) -> None:
    lock = (ROOT / "examples/arithmetic/requirements.txt").read_text()
    package = "pyfiglet==" + lock.partition("\npyfiglet==")[2].partition("\npygments==")[0]
    (project / "requirements.txt").write_text(package)
    (project / "odd_rewards.py").write_text("import pyfiglet\n" + (project / "odd_rewards.py").read_text())
    (project / "runs").mkdir()
    (project / "runs/large").write_bytes(os.urandom(10 << 20))

    with stack(project) as without:
        log = without.compose("up", "--no-build", timeout_s=120).stdout
        assert without.container("trainer").attrs["State"]["ExitCode"] == 2
    assert "without pyfiglet==1.0.2 (not installed)" in log
    assert "--build" in log

    built = own_image.must("build", "trainer")
    assert "MB" not in "".join(line for line in built.splitlines() if "transferring project" in line)
    own_image.must("up", "--no-build", "--detach")
    assert own_image.wait(timeout_s=120) == 0, own_image.logs()

    (project / "requirements.txt").write_text("numpy==1.26.4\n")
    refused = own_image.compose("build", "trainer")
    assert refused.returncode != 0
    assert "requirements.txt conflicts with packages that Tandem pins: numpy (the image has " in refused.stdout
    _, log = preflight(own_image)
    assert "without numpy==1.26.4 (installed: " in log


def test_make_up_gives_a_project_its_own_name_and_make_down_keeps_its_volumes(tmp_path: Path) -> None:
    folder = write_project(tmp_path / unique_name().removeprefix("tandem-"))
    name = f"tandem-{folder.name}"

    (folder / "prepare.py").write_text("import time\nprint('a line of prepare.py', flush=True)\ntime.sleep(3)\n")

    with stack(folder) as made:
        made.name = name
        up = make("up", folder)
        assert up.returncode == 0, up.stdout
        assert "| a line of prepare.py\n" in up.stdout
        assert [record["step"] for record in made.metrics()] == [1, 2, 3, 4]
        assert name in make("ps", folder).stdout
        down = make("down", folder)
        assert down.returncode == 0, down.stdout
        left = made.leftovers()
        assert f"{name}_runs" in left
        assert not [each for each in left if each.endswith("-1")]
    made.engine.images.remove(f"{IMAGE_PREFIX}{name}-trainer:cpu")
