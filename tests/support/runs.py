"""A run of the chart's pods in a cluster of podman's, seen from outside."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from support import models, probes
from support.helm import Object, one
from support.podman import Cluster
from support.pods import Pod, lift
from support.projects import write_project

REACH_TIMEOUT_S = 120.0
POLL_S = 0.2
PREPARE = f"{Path(models.__file__).read_text()}\n\nmake_tiny_model(Path('model'))\n"


def upgraded(objects: Sequence[Object], to: Sequence[Object]) -> list[Object]:
    """The rendering `to` as `helm upgrade` makes it where `objects` are installed: with the token that is there."""
    return [*(thing for thing in to if thing["kind"] != "Secret"), one(objects, "Secret", "-token")]


def project_values(steps: int) -> dict[str, Any]:
    """The chart's values for the project of the deployment's tests, which makes its model itself."""
    with TemporaryDirectory() as folder:
        project = write_project(Path(folder) / "project")
        files = {path.name: path.read_text() for path in project.iterdir() if path.is_file()}
    config = yaml.safe_load(files.pop("config.yaml"))
    config["trainer"]["max_steps"] = steps
    return {"config": config, "project": {"files": {**files, "prepare.py": PREPARE}}}


class Run:
    """A rendering and the cluster that it is played in."""

    def __init__(self, cluster: Cluster, objects: Sequence[Object]) -> None:
        self.cluster, self.objects = cluster, objects
        self.generators, self.trainers, self.tests = (
            [pod for pod in lift(objects) if pod.component == component]
            for component in ("generator", "trainer", "test")
        )
        self.pods = [*self.generators, *self.trainers]

    # -- its life ------------------------------------------------------------------------------------------------

    def start(self, *, timeout_s: float) -> None:
        """Start all pods; the generators are ready afterwards."""
        self.cluster.play(self.objects, self.pods, timeout_s=timeout_s)
        for generator in self.generators:
            ready = probes.pass_in_time(generator, "readinessProbe", self.cluster.address(generator))
            assert ready, f"{generator.name} is not ready within the startup probe's budget: {self.logs()}"

    def start_trainers(self, *, timeout_s: float) -> None:
        """What an upgrade that leaves the generators as they are starts."""
        self.cluster.play(self.objects, self.trainers, timeout_s=timeout_s)

    def test(self, *, timeout_s: float) -> None:
        """What `helm test` does."""
        self.cluster.play(self.objects, self.tests, timeout_s=timeout_s)
        for test in self.tests:
            assert self.cluster.wait(test, timeout_s=timeout_s) == 0, self.cluster.logs(test)

    def end(self, *, timeout_s: float) -> list[int]:
        """The trainers' exit codes."""
        return [self.cluster.wait(trainer, timeout_s=timeout_s) for trainer in self.trainers]

    def reach(self, step: int) -> None:
        """Wait until every generator serves step `step`."""
        deadline = time.monotonic() + REACH_TIMEOUT_S
        for generator in self.generators:
            while self.step(generator) < step:
                assert time.monotonic() < deadline, f"no step {step} within {REACH_TIMEOUT_S} s: {self.logs()}"
                time.sleep(POLL_S)

    # -- what is seen of it --------------------------------------------------------------------------------------

    @cached_property
    def token(self) -> str:
        return base64.b64decode(one(self.objects, "Secret", "-token")["data"]["token"]).decode()

    def open(self, generator: Pod, path: str, token: str) -> bytes:
        request = urllib.request.Request(
            f"http://{self.cluster.address(generator)}:{generator.port('http')}{path}",
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())

    def ask(self, generator: Pod, path: str, *, token: str) -> int:
        """The status of the answer."""
        try:
            self.open(generator, path, token)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def served(self, generator: Pod) -> str:
        """The version that a generator serves."""
        return str(json.loads(self.open(generator, "/weights", self.token))["version"])

    def step(self, generator: Pod) -> int:
        """The step of that version; -1 while its server is not up."""
        try:
            return int(self.served(generator).split(".")[0])
        except OSError:
            return -1

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self._run_dir / "metrics.jsonl").read_text().splitlines()]

    def checkpoint(self, step: int) -> Path:
        return self._run_dir / "checkpoints" / f"{step:06d}"

    @property
    def _run_dir(self) -> Path:
        claim = one(self.objects, "PersistentVolumeClaim", "-runs")
        return self.cluster.folder(claim["metadata"]["name"], "default")

    def logs(self) -> str:
        return "\n".join(f"{pod.name}: {self.cluster.logs(pod)}" for pod in self.pods)

    def started_at(self, pod: Pod) -> str:
        return str(self.cluster.inspect(pod)["State"]["StartedAt"])

    def refusal(self, pod: Pod, path: str) -> str:
        """The name of the error that writing `path` in a pod ends with, or `none`."""
        code = (
            "import errno\n"
            f"try: open({path!r}, 'a').close(); print('none')\n"
            "except OSError as error: print(errno.errorcode[error.errno])"
        )
        return self.cluster.python(pod, code).strip()
