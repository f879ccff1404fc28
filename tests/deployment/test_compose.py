"""The compose stack on a real Docker engine with the mock generator: its end, its isolation, its leftovers."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import docker
import httpx
import pytest

from support.ports import free_port
from support.projects import write_project
from support.stack import Stack, set_steps, stack
from tandem_cli.testing import IMAGES

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("mock_images")]

SERVICES = ("generator", "trainer")
PROMETHEUS = "tandem-test-prometheus:local"


FIRST_CHECKPOINT = """
import pathlib, time
deadline = time.monotonic() + 60
while not any(pathlib.Path("/runs/default/checkpoints").glob("0*")):
    assert time.monotonic() < deadline, "no checkpoint within 60 s"
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running stack whose trainer trains until it is stopped."""
    project = write_project(tmp_path_factory.mktemp("endless") / "project")
    set_steps(project, 1_000_000)
    variables = {
        "TANDEM_WATCH_PORT": str(free_port()),
        "TANDEM_PROMETHEUS_PORT": str(free_port()),
        "PROMETHEUS_IMAGE": PROMETHEUS,
    }
    with Stack(project, variables=variables) as made:
        yield made


@pytest.fixture(scope="module")
def prometheus_image(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Build an image like prom/prometheus with the program of this machine: no registry is needed."""
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(shutil.which("prometheus") or "", folder / "prometheus")
    base = os.environ.get("PYTHON_BASE", "python:3.11-slim-bookworm")
    (folder / "Dockerfile").write_text(
        f"FROM {base}\nCOPY prometheus /bin/prometheus\nRUN install -d -o 65534 -g 65534 /prometheus\n"
        'ENTRYPOINT ["/bin/prometheus"]\n'
    )
    docker.from_env(timeout=300).images.build(path=str(folder), tag=PROMETHEUS, rm=True, forcerm=True)


def test_a_run_ends_after_its_last_step_and_leaves_nothing_behind(project: Path) -> None:
    with Stack(project) as made:
        assert made.wait(timeout_s=120) == 0
        assert [record["step"] for record in made.metrics()] == [1, 2, 3, 4]
    assert made.leftovers() == []


def test_killed_services_resume_and_no_step_is_lost(project: Path) -> None:
    set_steps(project, 200)
    with Stack(project) as made:
        made.python("trainer", FIRST_CHECKPOINT)
        for service in SERVICES:
            made.must("kill", service)
            made.must("start", service)
        assert made.wait(timeout_s=180) == 0
        records = made.metrics()
    assert [record["step"] for record in records] == list(range(1, 201))
    assert records[-1]["version"] == "200.2", "the second incarnation of the trainer ends the run"


def test_a_project_that_only_its_owner_can_read_is_copied(project: Path) -> None:
    for path in [project, *project.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
    with stack(project) as made:
        made.must("up", "--no-build", "preflight")
        assert made.container("preflight").attrs["State"]["ExitCode"] == 0


def test_the_hubs_token_reaches_the_preflight_and_is_in_no_environment(project: Path, tmp_path: Path) -> None:
    file = tmp_path / "hub-token"
    file.write_text("of-the-hub\n")
    file.chmod(0o600)
    (project / "prepare.py").write_text("import os, sys; sys.exit(os.environ.get('HF_TOKEN') != 'of-the-hub')")
    with stack(project, variables={"TANDEM_HF_TOKEN_FILE": str(file)}) as made:
        made.must("up", "--no-build", "preflight")
        container = made.container("preflight")
        assert container.attrs["State"]["ExitCode"] == 0, made.logs("preflight")
        assert "of-the-hub" not in json.dumps(container.attrs)


def test_cpu_sets_that_overlap_are_refused_before_a_model_is_loaded(project: Path) -> None:
    cpus = {"TANDEM_GENERATOR_CPUS": "0-1", "TANDEM_TRAINER_CPUS": "1"}
    with stack(project, variables=cpus) as made:
        up = made.compose("up", "--no-build", "--exit-code-from", "trainer")
        assert up.returncode == 2, up.stdout
        assert "which share 1" in up.stdout
        assert "serving" not in made.logs("generator")


def test_services_are_isolated_and_unprivileged(endless: Stack) -> None:
    for service in SERVICES:
        status = dict(
            line.split(":\t", 1)
            for line in endless.python(service, "print(open('/proc/1/status').read())").splitlines()
            if ":\t" in line
        )
        assert status["Uid"].split() == ["10001"] * 4
        assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"
        table = endless.must("exec", "-T", service, "cat", "/proc/net/route")
        targets = [line.split()[1] for line in table.splitlines()]
        assert targets[0] == "Destination"
        assert "00000000" not in targets, "there is a default route to the outside"
        assert refusal(endless, service, "/opt/x") == "EROFS"


def test_the_generator_can_write_its_lease_but_no_weights(endless: Stack) -> None:
    for path in ("/weights/x", "/opt/store/LATEST", "/project/x"):
        assert refusal(endless, "generator", path) == "EROFS"
    assert refusal(endless, "generator", "/leases/x") == "none"
    assert refusal(endless, "trainer", "/weights/x") == "none"


def test_the_token_is_in_no_environment_and_the_generator_requires_it(endless: Stack) -> None:
    token = endless.python("generator", "print(open('/secrets/token').read())").strip()
    assert len(token) >= 32
    for service in SERVICES:
        assert token not in json.dumps(endless.container(service).attrs)
    ask = (
        "import urllib.request as r, urllib.error as e\n"
        "def ask(headers):\n"
        "    try: return r.urlopen(r.Request('http://generator:8000/info', headers=headers), timeout=10).status\n"
        "    except e.HTTPError as error: return error.code\n"
        "token = open('/secrets/token').read()\n"
        "print(ask({}), ask({'Authorization': f'Bearer {token}'}))"
    )
    assert endless.python("trainer", ask).split() == ["401", "200"]


def test_the_page_of_the_runs_is_on_this_host_only_and_can_only_read_them(endless: Stack) -> None:
    endless.must("build", "watch", timeout_s=600)
    endless.must("up", "--detach", "--no-deps", "watch")
    address = endless.wait_for_log("watch", r"Open (http://127\.0\.0\.1:\d+/\?token=\S+)")
    with httpx.Client(follow_redirects=True, timeout=60) as browser:
        origin = address.partition("/?")[0]
        assert browser.get(f"{origin}/api/runs").status_code == 403
        assert browser.get(address).status_code == 200
        deadline = time.monotonic() + 120
        while not (runs := browser.get(f"{origin}/api/runs").json()):  # the run has not begun yet
            assert time.monotonic() < deadline, endless.logs("trainer")
            time.sleep(0.2)
        assert [run["name"] for run in runs] == ["default"]
    assert refusal(endless, "watch", "/runs/x") == "EROFS"
    assert refusal(endless, "watch", "/usr/x") == "EROFS"
    assert is_bound_to_this_host(endless, "watch")
    assert [mount["Destination"] for mount in endless.container("watch").attrs["Mounts"]] == ["/runs"]
    status = endless.python("watch", "print(open('/proc/1/status').read())")
    assert re.findall(r"(?:Uid|CapBnd):\t(\S+)", status) == ["10001", "0" * 16]
    (network,) = endless.container("watch").attrs["NetworkSettings"]["Networks"]
    assert network == f"{endless.name}_pages", "not that of the services"
    options = endless.engine.networks.get(network).attrs["Options"]
    assert options["com.docker.network.bridge.enable_ip_masquerade"] == "false", "nothing leads to the internet"


@pytest.mark.prometheus
def test_prometheus_scrapes_both_services_with_their_token(endless: Stack, prometheus_image: None) -> None:
    endless.must("up", "--detach", "--no-deps", "prometheus")
    assert is_bound_to_this_host(endless, "prometheus")
    port = endless.must("port", "prometheus", "9090").strip().rpartition(":")[2]
    deadline, found = time.monotonic() + 120, {""}
    while found != {"trainer", "generator"}:
        assert time.monotonic() < deadline, (found, endless.logs("prometheus"))
        time.sleep(1)
        with suppress(httpx.TransportError):
            query = {"query": "tandem_trainer_max_lag or tandem_ready"}
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params=query, timeout=60).json()
            found = {sample["metric"]["pod"].split("-")[1] for sample in answer.get("data", {}).get("result", ())}


def is_bound_to_this_host(made: Stack, service: str) -> bool:
    ports = made.container(service).attrs["NetworkSettings"]["Ports"].values()
    return {binding["HostIp"] for bindings in ports for binding in bindings} == {"127.0.0.1"}


def test_the_mock_image_is_small_and_has_neither_torch_nor_vllm() -> None:
    engine = docker.from_env(timeout=60)
    base = engine.images.get(os.environ.get("PYTHON_BASE", "python:3.11-slim-bookworm"))
    mock = engine.images.get(IMAGES["mock"])
    assert mock.attrs["Size"] - base.attrs["Size"] < 200e6
    installed = engine.containers.run(mock, ["-m", "pip", "list"], entrypoint=["python3"], remove=True).decode()
    assert "tandem-generator" in installed
    assert not {"torch", "vllm"} & {line.split()[0] for line in installed.splitlines()}


def refusal(made: Stack, service: str, path: str) -> str:
    """Try to write `path` in a service, and return the name of the error, or `none`."""
    code = (
        "import errno\n"
        f"try: open({path!r}, 'a').close(); print('none')\n"
        "except OSError as error: print(errno.errorcode[error.errno])"
    )
    return made.python(service, code).strip()
