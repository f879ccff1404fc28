"""The trainer's pod prepares the project, one pod at a time. The generators wait until the project is complete.

The tests run the commands of the rendered init containers on this machine.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from support.helm import ROOT, Object, one, render

pytestmark = pytest.mark.helm

TIMEOUT_S = 60.0
PREFLIGHT = ROOT / "docker/preflight.py"
PROJECT = "cache/projects/run-tandem"
CONFIG = "shared: {model: .}\ntrainer: {max_steps: 1, rewards: [{function: 'r:f'}]}\n"
IS_ROOT = os.geteuid() == 0
VOLUMES = ("weights", "cache", "runs")
NODES = {"trainer": {"nodes": 2}, "storage": {"runs": {"accessMode": "ReadWriteMany"}}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder below which a container's mount points are."""
    for folder in (*VOLUMES, "source", "config"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config/config.yaml").write_text(CONFIG)
    (tmp_path / "source/config.json").write_text("{}")
    (tmp_path / "source/model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return tmp_path


def init(kind: str, values: dict[str, Any] | None = None) -> Object:
    (container,) = one(render(values), kind)["spec"]["template"]["spec"]["initContainers"]
    return container


def start(
    container: Object, root: Path, *, preflight: Path = PREFLIGHT, user: int | None = None, **env: str
) -> subprocess.Popen[str]:
    """Start a container's command here, without its init and in a process group, as tini does.

    Args:
        preflight: the script that prepares the project; by default one that only creates the folder.
    """

    def here(text: str) -> str:
        text = re.sub(r"(?<![\w/])/(weights|cache|runs|source|config)\b", rf"{root}/\1", text)
        return text.replace(
            "python3 /opt/preflight.py",
            f"{sys.executable} {preflight}" if preflight else "true",
        )

    made = {entry["name"]: here(entry["value"]) for entry in container["env"]}
    assert container["command"][:3] == ["tini", "-g", "--"]
    return subprocess.Popen(
        [here(word) for word in container["command"][3:]],
        env={**os.environ, **made, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        process_group=0, user=user,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end, and return the exit status and the output."""
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output


def run(container: Object, root: Path, **env: Any) -> tuple[int, str]:
    return end(start(container, root, **env))


def impatient(container: Object) -> Object:
    """Return the container with a short wait for the project and for the lock."""
    script = re.sub(r"seq \d+", "seq 1", container["command"][-1])
    return {**container, "command": [*container["command"][:-1], re.sub(r"--timeout \d+", "--timeout 1", script)]}


def slow_preflight(root: Path) -> Path:
    """Return a script that takes the place of preflight.py. It ends when the file `go` exists, and records both."""
    script = root / "slow.py"
    script.write_text(f"""
import os, time
from pathlib import Path
root = Path({str(root)!r})
def note(word):
    with (root / "events").open("a") as events:
        events.write(word + "\\n")
note("begin")
for _ in range(3000):  # at most a minute
    if (root / "go").exists():
        break
    time.sleep(0.02)
note("end")
""")
    return script


def wait_for_events(root: Path, number: int) -> list[str]:
    deadline = time.monotonic() + TIMEOUT_S
    while len(found := events(root)) < number:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def events(root: Path) -> list[str]:
    file = root / "events"
    return file.read_text().split() if file.exists() else []


# -- the marker --------------------------------------------------------------------------------------------------------


def markers(values: dict[str, Any] | None = None) -> tuple[str, str]:
    """Return the marker that the generators wait for and the one that the trainer's pod writes."""
    waits, writes = (
        {entry["name"]: entry.get("value") for entry in init(kind, values)["env"]} for kind in ("StatefulSet", "Job")
    )
    assert waits["TANDEM_PROJECT_DIR"] == writes["TANDEM_PROJECT_DIR"]
    return waits["TANDEM_PREPARED"], writes["TANDEM_PREPARED"]


def test_the_trainers_marker_begins_with_that_of_the_generators_and_changes_with_the_trainers_configuration() -> None:
    (generators, trainer), (same, other) = markers(), markers({"config": {"trainer": {"max_steps": 7}}})
    assert generators == same
    assert trainer != other
    assert trainer.startswith(generators)
    assert other.startswith(generators)


def test_the_init_containers_prepare_the_project_and_wait_for_it(root: Path) -> None:
    (root / "source/rewards.py").write_text("x = 1\n")
    (root / "source/config.yaml").write_text("from: the project\n")
    wait, make = impatient(init("StatefulSet")), init("Job")
    status, output = run(wait, root)
    assert (status, "the project was not ready within 900 s" in output) == (1, True), output
    assert (root / "weights/served").is_dir()
    status, output = run(make, root, preflight=PREFLIGHT)
    assert status == 0, output
    project = root / PROJECT
    assert (project / "rewards.py").read_text() == "x = 1\n"
    assert (project / "config.yaml").read_text() == CONFIG, "the chart's configuration wins"
    assert run(wait, root)[0] == 0
    (project / ".prepared").write_text("another configuration")
    assert run(wait, root)[0] == 1


def test_the_first_of_several_trainer_pods_prepares_the_project_and_the_others_wait(root: Path) -> None:
    container = impatient(init("Job", NODES))
    assert "was not ready within" in run(container, root, JOB_COMPLETION_INDEX="1")[1]
    assert run(container, root, JOB_COMPLETION_INDEX="0")[0] == 0
    with (root / "weights/WRITER").open() as held:  # as the running trainer in the first pod does
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(container, root, JOB_COMPLETION_INDEX="1")[0] == 0


def test_the_other_trainer_pods_do_not_start_on_the_project_of_an_older_job(root: Path) -> None:
    assert run(init("Job", NODES), root, JOB_COMPLETION_INDEX="0")[0] == 0
    newer = impatient(init("Job", {**NODES, "config": {"trainer": {"max_steps": 7}}}))
    assert run(newer, root, JOB_COMPLETION_INDEX="1")[0] == 1


def test_the_project_is_incomplete_while_it_is_prepared_and_after_a_failure(root: Path) -> None:
    make, wait = init("Job"), impatient(init("StatefulSet"))
    assert run(make, root)[0] == 0
    process = start(make, root, preflight=slow_preflight(root))
    wait_for_events(root, 1)
    assert run(wait, root)[0] == 1
    (root / "go").touch()
    assert end(process)[0] == 0
    assert run(wait, root)[0] == 0
    (root / "source/prepare.py").write_text("raise SystemExit(1)\n")
    assert run(make, root, preflight=PREFLIGHT)[0] == 1
    assert run(wait, root)[0] == 1


def test_releases_that_share_a_cache_volume_have_a_folder_each() -> None:
    shared = {"storage": {"cache": {"existingClaim": "models"}}}
    folders = set()
    for release in ("a", "b"):
        objects = render(shared, release=release)
        pods = [one(objects, kind)["spec"]["template"]["spec"] for kind in ("StatefulSet", "Job")]
        (folder,) = {
            e["value"] for pod in pods for e in pod["initContainers"][0]["env"] if e["name"] == "TANDEM_PROJECT_DIR"
        }
        assert all(f"{folder}/config.yaml" in pod["containers"][0]["args"] for pod in pods)
        folders.add(folder)
    assert len(folders) == 2


def test_only_a_failure_that_a_retry_would_not_change_has_the_status_that_fails_the_job(root: Path) -> None:
    (rule,) = [
        rule for rule in one(render(), "Job")["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"
    ]
    assert rule["onExitCodes"] == {"operator": "In", "values": [2]}
    make = init("Job")
    (root / "source/prepare.py").write_text("raise SystemExit(3)\n")
    assert run(make, root, preflight=PREFLIGHT)[0] == 3
    (root / "source/prepare.py").write_text("raise ConnectionError('reset by peer')\n")
    assert run(make, root, preflight=PREFLIGHT)[0] == 1
    (root / "config/config.yaml").write_text(CONFIG.replace("max_steps", "max_stepss"))
    assert run(make, root, preflight=PREFLIGHT)[0] == 2


# -- the lock ----------------------------------------------------------------------------------------------------------


def test_a_project_is_not_prepared_while_a_trainer_runs(root: Path) -> None:
    with (root / "weights/WRITER").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, output = run(impatient(init("Job")), root)
    assert (status, "timeout while waiting to get lock" in output) == (1, True), output
    assert not (root / PROJECT).exists()


def test_two_trainer_pods_never_prepare_at_the_same_time(root: Path) -> None:
    make, slow = init("Job"), slow_preflight(root)
    first = start(make, root, preflight=slow)
    wait_for_events(root, 1)
    assert run(impatient(make), root, preflight=slow)[0] == 1, "the second one waits for the lock"
    second = start(make, root, preflight=slow)
    (root / "go").touch()
    assert [end(first)[0], end(second)[0]] == [0, 0]
    assert events(root) == ["begin", "end"] * 2


def test_the_lock_keeps_the_name_of_its_holder(root: Path) -> None:
    (root / "weights/WRITER").write_text("process 7 on trainer-0")
    assert run(init("Job"), root)[0] == 0
    assert (root / "weights/WRITER").read_text() == "process 7 on trainer-0"


# -- volumes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def root_of_another_user(root: Path) -> Iterator[Path]:
    """A folder for mount points that the test's user may enter but not write to."""
    with TemporaryDirectory() as folder:
        for path in (Path(folder), *map(Path(folder).joinpath, VOLUMES)):
            path.mkdir(exist_ok=True)
            path.chmod(0o755 if IS_ROOT else 0o555)
        yield Path(folder)
        for path in map(Path(folder).joinpath, VOLUMES):
            path.chmod(0o755)


@pytest.mark.parametrize(("kind", "volume"), [("StatefulSet", "weights"), *(("Job", volume) for volume in VOLUMES)])
def test_a_volume_that_ignores_fs_group_is_named_with_its_owner_and_the_fix(
    kind: str, volume: str, root_of_another_user: Path
) -> None:
    root = root_of_another_user
    for other in {*VOLUMES} - {volume}:
        (root / other).chmod(0o777)
    status, output = run(init(kind), root, user=10001 if IS_ROOT else None)
    assert status == 1, "the owner of the volume can fix it while the Job retries"
    assert f"{root}/{volume} (owner {os.geteuid()}:" in output
    assert 'got "Permission denied", expected a volume that user 10001 may write to' in output
    assert "Fix: run chown 10001:10001" in output


def test_the_check_of_the_volumes_leaves_nothing_behind(root: Path) -> None:
    assert run(init("Job"), root)[0] == 0
    assert [path.name for volume in VOLUMES for path in (root / volume).iterdir()] == ["WRITER", "projects"]


# -- SIGTERM -----------------------------------------------------------------------------------------------------------


def test_a_stop_ends_every_process_of_the_preparation_and_the_next_pod_goes_on(root: Path) -> None:
    make, slow = init("Job"), slow_preflight(root)
    (root / "source/prepare.py").write_text(f"import runpy; runpy.run_path({str(slow)!r})\n")
    process = start(make, root, preflight=PREFLIGHT)
    wait_for_events(root, 1)
    waiting = start(make, root)
    for stopped in (process, waiting):
        os.killpg(stopped.pid, signal.SIGTERM)  # as `tini -g` does
        assert end(stopped)[0] == -signal.SIGTERM
    assert not (root / PROJECT / ".prepared").exists()
    (root / "go").touch()
    assert run(impatient(make), root)[0] == 0, "no process of the stopped pod holds the lock"


def test_a_stop_ends_a_generator_that_waits_for_the_project(root: Path) -> None:
    process = start(init("StatefulSet"), root)
    deadline = time.monotonic() + TIMEOUT_S
    while not (root / "weights/served").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    assert end(process)[0] == -signal.SIGTERM


def test_every_command_that_the_chart_sets_runs_under_an_init_that_passes_signals_to_all_its_processes() -> None:
    pods = [one(render(), kind)["spec"]["template"]["spec"] for kind in ("StatefulSet", "Job")]
    pods.append(one(render(), "Pod")["spec"])
    commands = [
        c["command"] for pod in pods for c in (*pod.get("initContainers", []), *pod["containers"]) if "command" in c
    ]
    assert len(commands) == 3
    assert all(command[:3] == ["tini", "-g", "--"] for command in commands)
