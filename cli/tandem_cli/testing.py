"""Tandem in other people's tests: a generator in a container, and the whole stack (docs/integrate/testing.md).

Wants `pip install tandem-cli[testing]`, a Docker engine, and images that `docker compose build` has made.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import docker
import httpx
import psutil
from docker.models.containers import Container
from testcontainers.core.container import DockerContainer
from testcontainers.core.waiting_utils import WaitStrategy, WaitStrategyTarget

PORT = 8000
PROJECT_LABEL = "com.docker.compose.project"
IMAGES = {"mock": "tandem-generator:mock", "vllm": "tandem-generator:cpu"}
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_NAME = re.compile(rf"tandem-test-{_HOST}-(\d+)-")
"""Names tell whose they are: an engine may serve several machines, and only this one knows its processes."""


class GeneratorContainer(DockerContainer):
    """A generator in a container: ready inside the `with` block, gone after it.

    It serves the weight store `weights_dir` as the user who runs the test, or without one only the model it starts
    with. `client` is an httpx client that knows its address and token.
    """

    def __init__(
        self,
        engine: Literal["mock", "vllm"] = "mock",
        *,
        model: str | Path = "mock",
        faults: Mapping[str, Any] | None = None,
        weights_dir: Path | None = None,
        options: Mapping[str, Any] | None = None,
        image: str | None = None,
        start_timeout_s: float = 300.0,
    ) -> None:
        """Prepare it; `start()` or `with` starts it.

        Args:
            model: a model's directory, or for the mock any name.
            faults: of the mock engine, `generator.mock.faults` of docs/reference/config.md.
            options: any other keys of section `generator`, dotted.
            image: None: the one of compose.yaml.
        """
        super().__init__(image or IMAGES[engine], name=unique_name(), ports=[PORT])
        self.token = secrets.token_urlsafe(32)
        self.with_copy_into_container(self.token.encode(), "/opt/token")
        self.with_env("TANDEM_TOKEN_FILE", "/opt/token")
        self.with_tmpfs_mount("/tmp", "exec,mode=1777")  # noqa: S108 - the container's
        if Path(model).is_dir():
            self.with_volume_mapping(Path(model).resolve(), "/model")
            model = "/model"
        if weights_dir:
            leases = weights_dir.resolve() / "served"
            leases.mkdir(parents=True, exist_ok=True)
            self.with_volume_mapping(leases.parent, "/weights")
            self.with_volume_mapping(leases, "/leases", "rw")
        else:
            self.with_tmpfs_mount("/weights", "mode=1777").with_tmpfs_mount("/leases", "mode=1777")
        keys = {**(options or {}), **{f"mock.faults.{name}": value for name, value in (faults or {}).items()}}
        settings = [f"--generator.{key}={json.dumps(value)}" for key, value in keys.items()]
        self.with_command(["--model", str(model), *settings])
        self.with_kwargs(user=f"{os.getuid()}:{os.getgid()}", cap_drop=["ALL"], security_opt=["no-new-privileges:true"])
        self.waiting_for(_Ready().with_startup_timeout(int(start_timeout_s)))

    @property
    def url(self) -> str:
        return f"http://{self.get_container_host_ip()}:{self.get_exposed_port(PORT)}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def client(self) -> httpx.Client:
        """A new one, for a `with` block."""
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=120.0)


class _Ready(WaitStrategy):
    """Until the policy serves; ends at once when the container does."""

    def wait_until_ready(self, container: WaitStrategyTarget) -> None:
        assert isinstance(container, GeneratorContainer)
        deadline = time.monotonic() + self._startup_timeout
        while why := _why_not_ready(container):
            container.reload()
            if container.status in ("exited", "dead") or time.monotonic() > deadline:
                log = b"".join(container.get_logs()).decode(errors="replace")
                waited = f"within {self._startup_timeout:g} s"
                raise RuntimeError(f"the generator is {container.status}, not ready {waited}: {why}; its log:\n{log}")
            time.sleep(0.2)


def _why_not_ready(container: GeneratorContainer) -> str | None:
    try:
        with container.client as client:
            answer = client.get("/readyz")
    except (httpx.TransportError, TimeoutError, ConnectionError) as error:  # also of looking up its port
        return f"{type(error).__name__}: {error}"
    return None if answer.is_success else answer.text


class TandemStack:
    """The compose stack of a checkout, under a project name of its own: up in the `with` block, gone after it."""

    files: Sequence[str] = ("compose.yaml",)
    """Compose files of the checkout, whichever its .env names; with none given here, those of .env."""

    def __init__(
        self,
        project: str | Path = "examples/digits",
        *,
        checkout: str | Path = ".",
        engine: Literal["mock", "vllm"] = "mock",
        replicas: int = 1,
        processes: int = 1,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare it.

        Args:
            project: the project to train, from the checkout or absolute.
            replicas: generators; `processes` likewise, of the trainer.
            variables: any others of docs/deploy/containers.md.
        """
        self.name = unique_name()
        self.engine = docker.from_env(timeout=60)
        self._checkout, self._replicas = Path(checkout), replicas
        self._environment = {
            **os.environ,
            "TANDEM_PROJECT": str(self._checkout.resolve() / project),
            "TANDEM_GENERATOR_TARGET": {"mock": "mock", "vllm": "cpu"}[engine],
            "TANDEM_TRAINER_PROCESSES": str(processes),
            **(variables or {}),
        }

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Bring it up; the trainer has begun when this returns."""
        self.must("up", "--no-build", "--detach", "--scale", f"generator={self._replicas}")
        return self

    def stop(self) -> None:
        """Remove its containers, networks and volumes."""
        self.must("down", "--volumes", "--timeout", "5")

    def wait(self, timeout_s: float) -> int:
        """The trainer's exit code, once it has ended for good.

        Raises:
            TimeoutError: it has not.
        """
        deadline = time.monotonic() + timeout_s
        while (trainer := self.container("trainer")).status != "exited":
            if time.monotonic() > deadline:
                raise TimeoutError(f"the trainer is {trainer.status} after {timeout_s:g} s; its log:\n{self.logs()}")
            time.sleep(0.5)
        return int(trainer.attrs["State"]["ExitCode"])

    def metrics(self) -> list[dict[str, Any]]:
        """What the run has logged so far, a step each; also after the trainer has ended."""
        with tempfile.TemporaryDirectory() as folder:
            self.copy_runs(Path(folder) / "runs")
            (path,) = Path(folder).glob("runs/*/metrics.jsonl")
            return [json.loads(line) for line in path.read_text().splitlines()]

    def copy_runs(self, target: Path) -> Path:
        """Copy the runs volume here."""
        self.must("cp", "trainer:/runs", str(target))
        return target

    def logs(self, service: str = "trainer") -> str:
        return self.must("logs", "--no-log-prefix", service)

    def container(self, service: str) -> Container:
        """The only replica of a service."""
        (found,) = self.containers(service)
        return found

    def containers(self, service: str) -> list[Container]:
        """The replicas of a service, in the order of their numbers."""
        labels = [f"{PROJECT_LABEL}={self.name}", f"com.docker.compose.service={service}"]
        return sorted(self.engine.containers.list(all=True, filters={"label": labels}), key=lambda c: str(c.name))

    def compose(self, *arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run `docker compose` to its end, whatever that is."""
        files = [word for name in self.files for word in ("--file", name)]
        return subprocess.run(
            ["docker", "compose", *files, "--project-name", self.name, "--progress", "plain", *arguments],
            cwd=self._checkout,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    def must(self, *arguments: str, timeout_s: float = 300.0) -> str:
        """The output of a `docker compose` that has to succeed.

        Raises:
            RuntimeError: it did not; the message has its output.
        """
        done = self.compose(*arguments, timeout_s=timeout_s)
        if done.returncode:
            raise RuntimeError(f"docker compose {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout


def sweep() -> None:
    """Remove what test processes of this machine that were killed have left; what Ryuk does, where it cannot be had."""
    engine = docker.from_env(timeout=60)
    for container in engine.containers.list(all=True):
        if is_orphan(container.name):
            container.remove(force=True, v=True)
    for resource in [*engine.networks.list(), *engine.volumes.list()]:
        if is_orphan(resource.name):
            resource.remove()


def unique_name() -> str:
    """For what a test makes, so that `sweep` and its like know it."""
    return f"tandem-test-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"


def is_orphan(name: str) -> bool:
    """Whether the process that named it has ended."""
    owner = _NAME.match(name)
    return owner is not None and not psutil.pid_exists(int(owner[1]))
