"""A run that nobody watches: it ends by itself, goes on after failures, and says in its log what happened."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from support.projects import write_project
from support.stack import Stack, set_steps, stack

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("mock_images")]

KILL_TRAINER = """
import os, pathlib, signal
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    words = (folder / "cmdline").read_bytes().split(b"\\0")
    if b"tandem_trainer" in words and b"launch" not in words:
        os.kill(int(folder.name), signal.SIGKILL)
"""
CHECKPOINT = """
import pathlib, time
deadline = time.monotonic() + 60
while not any(pathlib.Path("/runs/default/checkpoints").glob("0*")):
    assert time.monotonic() < deadline, "no checkpoint within 60 s"
    time.sleep(0.05)
"""
STEP = re.compile(
    r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO     step (\d+)/4  reward 0\.\d{3}  [\d,]+ tokens/s  lag \d  [\d.]+ s", re.M
)


def test_plain_up_returns_when_the_run_is_over_and_its_log_tells_the_story(project: Path) -> None:
    with stack(project) as made:
        up = made.compose("up", "--no-build", timeout_s=120)
        assert up.returncode == 0, up.stdout
        exit_codes = {name: made.container(name).attrs["State"]["ExitCode"] for name in ("trainer", "generator")}
        assert exit_codes == {"trainer": 0, "generator": 0}
        log = made.logs()
        assert STEP.findall(log) == ["1", "2", "3", "4"]
        assert "training model on 9 prompts of prompts.jsonl, scored by odd_rewards:odd" in log
        assert "done: the run is finished at step 4; results in /runs/default" in log
        assert "ready, serving version 0.0" in made.logs("generator")


def test_a_trainer_whose_process_is_killed_goes_on_by_itself(project: Path) -> None:
    set_steps(project, 100)
    with Stack(project, variables={"TANDEM_LOG": "json"}) as made:
        made.python("trainer", CHECKPOINT)
        made.python("trainer", KILL_TRAINER)
        assert made.wait(timeout_s=180) == 0
        assert [record["step"] for record in made.metrics()] == list(range(1, 101))
        lines = [json.loads(line) for line in made.logs().splitlines()]
    (retry,) = [line for line in lines if line.get("retry")]
    assert (retry["level"], retry["status"]) == ("warning", 137)
    assert any("resumed from step" in line["message"] for line in lines)


@pytest.mark.parametrize(
    ("processes", "options", "status"), [(1, (), 0), (1, ("--exit-code-from", "trainer"), 2), (2, (), 0)]
)
def test_a_mistake_ends_everything_with_status_2(
    project: Path, processes: int, options: tuple[str, ...], status: int
) -> None:
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["trainer"]["rewards"] = [{"function": "odd_rewards:absent"}]
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    with stack(project, processes=processes) as made:
        up = made.compose("up", "--no-build", *options, timeout_s=120)
        assert up.returncode == status, up.stdout
        assert "starting it again" not in up.stdout
        assert made.container("trainer").attrs["State"]["ExitCode"] == 2


def test_the_volume_has_what_its_project_has_now_and_what_it_made(project: Path, tmp_path: Path) -> None:
    (project / "prepare.py").write_text("open('made-by-prepare', 'w').close()")
    other = write_project(tmp_path / "other")
    show = ("run", "--rm", "--no-deps", "--entrypoint", "ls", "trainer", "-A", "/project")
    with stack(project) as made:
        made.must("up", "--no-build", "preflight")
        assert "made-by-prepare" in made.must(*show)
        (project / "new-file").touch()
        (project / "odd_rewards.py").unlink()
        made.must("up", "--no-build", "preflight")
        files = made.must(*show)
        assert "made-by-prepare" in files
        assert "new-file" in files
        assert "odd_rewards.py" not in files
        made.use_project(other)
        up = made.compose("up", "--no-build", timeout_s=120)
        assert f"belongs to {project}" in up.stdout
        assert made.container("trainer").attrs["State"]["ExitCode"] == 2
        assert files == made.must(*show).replace(".tandem-failure\n", "")


def test_a_folder_that_does_not_exist_is_an_error_and_is_not_created(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with stack(missing) as made:
        up = made.compose("up", "--no-build", "preflight")
    assert up.returncode != 0
    assert str(missing) in up.stdout
    assert not missing.exists()


def test_a_project_may_be_named_by_a_relative_path(project: Path) -> None:
    checkout = Path(__file__).parents[2]
    relative = checkout / "runs-of-a-test" / "project"
    shutil.copytree(project, relative)
    try:
        with stack(project) as made:
            made.use_project(relative.relative_to(checkout))
            made.must("up", "--no-build", "preflight")
    finally:
        shutil.rmtree(relative.parent)


@pytest.fixture
def listener() -> Iterator[int]:
    """A service of this host that listens on all of its addresses."""
    with socket.create_server(("0.0.0.0", 0)) as server:  # the kernel accepts connections
        yield server.getsockname()[1]


def test_containers_cannot_connect_to_services_of_the_host(project: Path, listener: int) -> None:
    set_steps(project, 1_000_000)
    with Stack(project) as made:
        network = made.engine.networks.get(f"{made.name}_rl")
        gateway = network.attrs["IPAM"]["Config"][0]["Gateway"]
        host = socket.gethostbyname(socket.gethostname())
        code = (
            "import socket\n"
            f"for host in ({gateway!r}, {host!r}, '172.17.0.1'):\n"
            f"    try: socket.create_connection((host, {listener}), 3); print(host, 'reached')\n"
            "    except OSError: pass\n"
        )
        for service in ("generator", "trainer"):
            assert made.python(service, code) == ""


def test_every_container_is_limited_and_its_log_is_rotated(project: Path) -> None:
    limits = {"TANDEM_TMP_SIZE": "64m", "TANDEM_GENERATOR_MEMORY": "2g", "TANDEM_TRAINER_MEMORY": "3g"}
    set_steps(project, 1_000_000)
    with Stack(project, variables=limits) as made:
        for service, memory in (("generator", 2 << 30), ("trainer", 3 << 30), ("preflight", 0)):
            host = made.container(service).attrs["HostConfig"]
            assert (host["Memory"], host["PidsLimit"]) == (memory, 4096)
            assert "size=64m" in host["Tmpfs"]["/tmp"]
            assert host["LogConfig"] == {"Type": "local", "Config": {"max-size": "20m", "max-file": "5"}}
