"""A run of the chart's pods in a podman cluster, observed from outside."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from support import models, probes
from support.helm import Object, one
from support.podman import Cluster
from support.pods import Pod, lift
from support.projects import course, write_project

REACH_TIMEOUT_S = 120.0
POLL_S = 0.2
PREPARE = f"{Path(models.__file__).read_text()}\n\nmake_tiny_model(Path('model'))\n"


def upgraded(objects: Sequence[Object], to: Sequence[Object]) -> list[Object]:
    """Return the rendering `to` as an upgrade of `objects` makes it: it keeps the existing token."""
    return [*(thing for thing in to if thing["kind"] != "Secret"), one(objects, "Secret", "-tandem-token")]


def project_values(steps: int) -> dict[str, Any]:
    """Return the chart's values for the project of the deployment tests. Its prepare.py creates the model."""
    with TemporaryDirectory() as folder:
        project = write_project(Path(folder) / "project")
        files = {path.name: path.read_text() for path in project.iterdir() if path.is_file()}
    config = yaml.safe_load(files.pop("config.yaml"))
    config["trainer"]["max_steps"] = steps
    return {"config": config, "project": {"files": {**files, "prepare.py": PREPARE}}}


class Run:
    """A rendering of the chart, and the cluster that runs it."""

    def __init__(self, cluster: Cluster, objects: Sequence[Object]) -> None:
        self.cluster, self.objects = cluster, objects
        self.generators, self.trainers, self.environments, self.tests = (
            [pod for pod in lift(objects) if pod.component == component]
            for component in ("generator", "trainer", "environment", "test")
        )
        self.pods = [*self.generators, *self.trainers, *self.environments]

    # -- start and end -------------------------------------------------------------------------------------------

    def start(self, *, timeout_s: float) -> None:
        """Start all pods, and wait until the generators are ready."""
        self.cluster.play(self.objects, self.pods, timeout_s=timeout_s)
        for generator in self.generators:
            ready = probes.pass_in_time(generator, "readinessProbe", self.cluster.address(generator))
            assert ready, f"{generator.name} is not ready within the startup probe's budget: {self.logs()}"

    def start_trainers(self, *, timeout_s: float) -> None:
        """Start the trainers only, as an upgrade does that does not change the generators."""
        self.cluster.play(self.objects, self.trainers, timeout_s=timeout_s)

    def test(self, *, timeout_s: float) -> None:
        """Run the test pods, as `helm test` does."""
        self.cluster.play(self.objects, self.tests, timeout_s=timeout_s)
        for test in self.tests:
            assert self.cluster.wait(test, timeout_s=timeout_s) == 0, self.cluster.logs(test)

    def end(self, *, timeout_s: float) -> list[int]:
        """Wait for the trainers and return their exit codes."""
        return [self.cluster.wait(trainer, timeout_s=timeout_s) for trainer in self.trainers]

    def reach(self, step: int) -> None:
        """Wait until every generator serves step `step`."""
        deadline = time.monotonic() + REACH_TIMEOUT_S
        for generator in self.generators:
            while self.step(generator) < step:
                assert time.monotonic() < deadline, (
                    f"step {step} was not reached within {REACH_TIMEOUT_S} s: {self.logs()}"
                )
                time.sleep(POLL_S)

    # -- observations --------------------------------------------------------------------------------------------

    @cached_property
    def token(self) -> str:
        return base64.b64decode(one(self.objects, "Secret", "-tandem-token")["data"]["token"]).decode()

    def open(self, generator: Pod, path: str, token: str) -> bytes:
        request = urllib.request.Request(
            f"http://{self.cluster.address(generator)}:{generator.port('http')}{path}",
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def ask(self, generator: Pod, path: str, *, token: str) -> int:
        """Send a request and return the status of the answer."""
        try:
            self.open(generator, path, token)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def served(self, generator: Pod) -> str:
        """Return the version that a generator serves."""
        return str(json.loads(self.open(generator, "/weights", self.token))["version"])

    def step(self, generator: Pod) -> int:
        """Return the step of the served version, or -1 while the server is not up."""
        try:
            return int(self.served(generator).split(".")[0])
        except (OSError, HTTPException):  # such as an answer of which the killed server sent the first half
            return -1

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def checkpoint(self, step: int) -> Path:
        return self.run_dir / "checkpoints" / f"{step:06d}"

    @cached_property
    def run_dir(self) -> Path:
        config = yaml.safe_load(one(self.objects, "ConfigMap", "-config")["data"]["config.yaml"])
        claim = one(self.objects, "PersistentVolumeClaim", "-runs")
        return self.cluster.folder(claim["metadata"]["name"], config["trainer"].get("run_name", "default"))

    def logs(self) -> str:
        return "\n".join(f"{pod.name}: {self.cluster.logs(pod)}" for pod in self.pods)

    def started_at(self, pod: Pod) -> str:
        return str(self.cluster.inspect(pod)["State"]["StartedAt"])

    def refusal(self, pod: Pod, path: str) -> str:
        """Try to write `path` in a pod. Return the name of the error, or `none`."""
        code = (
            "import errno\n"
            f"try: open({path!r}, 'a').close(); print('none')\n"
            "except OSError as error: print(errno.errorcode[error.errno])"
        )
        return self.cluster.python(pod, code).strip()


def results(run: Run) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Return what two runs with the same results share: the figures of all steps, and the last parameters."""
    steps = course(run.metrics())
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    model = {file.name: file.read_bytes() for file in (run.checkpoint(len(steps)) / "model").glob("*.safetensors")}
    assert model
    return steps, model
