"""Tandem in your own tests: a generator in a container, or the complete stack (docs/integrate/testing.md).

Requires `pip install tandem-cli[testing]`, a Docker engine, and images from `docker compose build`.
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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, Self

import docker
import httpx
from docker.errors import APIError
from docker.models.containers import Container

try:
    import psutil
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.waiting_utils import WaitStrategy, WaitStrategyTarget
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'tandem_cli.testing needs {error.name}, which is not installed. Fix: pip install "tandem-cli[testing]"',
        name=error.name,
    ) from error

PORT = 8000
PROJECT_LABEL = "com.docker.compose.project"
IMAGE_PREFIX = os.environ.get("TANDEM_IMAGES", "")
IMAGES = {"mock": f"{IMAGE_PREFIX}tandem-generator:mock", "vllm": f"{IMAGE_PREFIX}tandem-generator:cpu"}
TRAINER_IMAGE = f"{IMAGE_PREFIX}tandem-trainer"
ENVIRONMENT_IMAGE = f"{IMAGE_PREFIX}tandem-environment"
"""Without a tag. Otherwise each stack would need an image with its own name (compose.yaml)."""
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_NAME = re.compile(rf"tandem-test-{_HOST}-(\d+)-")
"""Names contain a hash of the host and the process id. An engine may serve several machines; a machine can only check
whether its own processes are alive."""
_SWEPT_BY_ANOTHER = (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.FORBIDDEN)
"""The engine's answers if another test process has removed something, is removing it, or removes what uses it first."""


class GeneratorContainer(DockerContainer):
    """A generator in a container. It is ready inside the `with` block and removed after it.

    It runs as the user who runs the test, and serves versions from the weight store `weights_dir`. Without one it
    serves only its initial model. `client` is an httpx client with the generator's address and token.
    """

    def __init__(
        self,
        engine: Literal["mock", "vllm"] = "mock",
        *,
        model: str | Path = "mock",
        faults: Mapping[str, Any] | None = None,
        script: str | Path | Sequence[Mapping[str, Any]] | None = None,
        weights_dir: Path | None = None,
        options: Mapping[str, Any] | None = None,
        image: str | None = None,
        start_timeout_s: float = 300.0,
    ) -> None:
        """Configure the container; `start()` or `with` starts it.

        Args:
            model: a model's directory. The mock engine accepts any name.
            faults: faults of the mock engine, the keys of `generator.mock.faults` in docs/reference/config.md.
            script: what the mock engine says, as a file or its rows (`generator.mock.script`).
            options: other keys of the section `generator`, such as `{"vllm.max_num_seqs": 8}`.
            image: None: the image of compose.yaml.
        """
        super().__init__(image or IMAGES[engine], name=unique_name(), ports=[PORT])
        self.token = secrets.token_urlsafe(32)
        self.with_copy_into_container(self.token.encode(), "/opt/token")
        self.with_env("TANDEM_TOKEN_FILE", "/opt/token")
        self.with_tmpfs_mount("/tmp", "exec,mode=1777")  # noqa: S108 - a path in the container
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
        if script is not None:
            keys["mock.script"] = self._copy_script(script)
        settings = [f"--generator.{key}={json.dumps(value)}" for key, value in keys.items()]
        self.with_command(["--model", str(model), *settings])
        self.with_kwargs(user=f"{os.getuid()}:{os.getgid()}", cap_drop=["ALL"], security_opt=["no-new-privileges:true"])
        self.waiting_for(_Ready().with_startup_timeout(int(start_timeout_s)))

    def _copy_script(self, script: str | Path | Sequence[Mapping[str, Any]]) -> str:
        """Copy a script of the mock into the container, and return its path there."""
        if isinstance(script, str | Path):
            path = f"/opt/script{Path(script).suffix}"
            content = Path(script).read_bytes()
        else:
            path = "/opt/script.jsonl"
            content = "".join(json.dumps(row) + "\n" for row in script).encode()
        self.with_copy_into_container(content, path)
        return path

    @property
    def url(self) -> str:
        return f"http://{self.get_container_host_ip()}:{self.get_exposed_port(PORT)}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def client(self) -> httpx.Client:
        """A new httpx client, for a `with` block."""
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=120.0)


class _Ready(WaitStrategy):
    """Waits until the generator serves its policy. Fails at once if the container ends."""

    def wait_until_ready(self, container: WaitStrategyTarget) -> None:
        assert isinstance(container, GeneratorContainer)
        deadline = time.monotonic() + self._startup_timeout
        while why := _why_not_ready(container):
            container.reload()
            if container.status in ("exited", "dead") or time.monotonic() > deadline:
                log = b"".join(container.get_logs()).decode(errors="replace")
                raise RuntimeError(
                    f"the generator was not ready within {self._startup_timeout:g} s, its container is "
                    f"{container.status}: {why}. Its log:\n{log}"
                )
            time.sleep(0.2)


def _why_not_ready(container: GeneratorContainer) -> str | None:
    try:
        with container.client as client:
            answer = client.get("/readyz")
    except (httpx.TransportError, TimeoutError, ConnectionError) as error:  # looking up the port raises the last two
        return f"{type(error).__name__}: {error}"
    return None if answer.is_success else answer.text


ERASE_LINE = "\x1b[2K"
"""What `docker compose logs` writes before each line, also if its output is not a terminal."""


class TandemStack:
    """The compose stack of a checkout, under its own project name. It is removed at the end of the `with` block."""

    files: Sequence[str] = ("compose.yaml",)
    """Compose files of the checkout. An empty sequence uses those that .env names."""

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
        """Configure the stack; `start()` or `with` starts it.

        Args:
            project: the project to train: an absolute path, or relative to `checkout`.
            checkout: the folder with Tandem's compose.yaml.
            replicas: number of generators.
            processes: number of trainer processes.
            variables: other variables of docs/deploy/containers.md.
        """
        self.name = unique_name()
        self.engine = docker.from_env(timeout=60)
        self._checkout = Path(checkout)
        self._replicas = replicas
        self._environment = {
            **os.environ,
            "TANDEM_PROJECT": str(self._checkout.resolve() / project),
            "TANDEM_GENERATOR_TARGET": {"mock": "mock", "vllm": "cpu"}[engine],
            "TANDEM_TRAINER_PROCESSES": str(processes),
            "TANDEM_TRAINER_IMAGE": TRAINER_IMAGE,
            "TANDEM_ENVIRONMENT_IMAGE": ENVIRONMENT_IMAGE,
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
        """Start the stack. The trainer's container is running when this returns."""
        self.must("up", "--no-build", "--detach", "--scale", f"generator={self._replicas}")
        return self

    def stop(self) -> None:
        """Remove its containers, networks and volumes."""
        self.must("--profile", "*", "down", "--volumes", "--timeout", "5")

    def wait(self, timeout_s: float) -> int:
        """Wait until the trainer has ended and will not be restarted, and return its exit code.

        Raises:
            TimeoutError: the trainer has not ended in time.
        """
        deadline = time.monotonic() + timeout_s
        while (trainer := self.container("trainer")).status != "exited":
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"the trainer's container is {trainer.status} after {timeout_s:g} s, expected exited. Its log:\n"
                    f"{self.logs()}"
                )
            time.sleep(0.5)
        return int(trainer.attrs["State"]["ExitCode"])

    def metrics(self) -> list[dict[str, Any]]:
        """Return the run's metrics so far, one record per step. Works after the trainer has ended, too."""
        with tempfile.TemporaryDirectory() as folder:
            self.copy_runs(Path(folder) / "runs")
            (path,) = Path(folder).glob("runs/*/metrics.jsonl")
            return [json.loads(line) for line in path.read_text().splitlines()]

    def copy_runs(self, target: Path) -> Path:
        """Copy the runs volume to `target` on this machine."""
        self.must("cp", "trainer:/runs", str(target))
        return target

    def logs(self, service: str = "trainer") -> str:
        """Return the log of a service."""
        return self.must("logs", "--no-log-prefix", service).replace(ERASE_LINE, "")

    def container(self, service: str) -> Container:
        """Return the container of a service that has one replica.

        Raises:
            RuntimeError: The service has no container, or several.
        """
        found = self.containers(service)
        if len(found) != 1:
            names = ", ".join(f"{container.name} ({container.status})" for container in found) or "none"
            raise RuntimeError(f"got these containers of the service {service} in {self.name}: {names}; expected one")
        return found[0]

    def containers(self, service: str) -> list[Container]:
        """Return the containers of a service, ordered by name. Those of `docker compose run` are not among them."""
        compose = "com.docker.compose"
        labels = [f"{PROJECT_LABEL}={self.name}", f"{compose}.service={service}", f"{compose}.oneoff=False"]
        found = self.engine.containers.list(all=True, filters={"label": labels}, ignore_removed=True)
        return sorted(found, key=lambda container: str(container.name))

    def compose(self, *arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run `docker compose` and return its result, even if it fails."""
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
        """Run `docker compose` and return its output.

        Raises:
            RuntimeError: it failed; the message has its output.
        """
        done = self.compose(*arguments, timeout_s=timeout_s)
        if done.returncode:
            raise RuntimeError(
                f"docker compose {' '.join(arguments)} ended with exit code {done.returncode}:\n{done.stdout}"
            )
        return done.stdout


def sweep() -> None:
    """Remove the containers, networks and volumes of killed test processes of this machine.

    Use it where testcontainers' Ryuk, which does the same, cannot run.
    """
    engine = docker.from_env(timeout=60)
    for container in engine.containers.list(all=True, ignore_removed=True):
        if is_orphan(container.name):
            _remove(partial(container.remove, force=True, v=True))
    for resource in [*engine.networks.list(), *engine.volumes.list()]:
        if is_orphan(resource.name):
            _remove(resource.remove)


def _remove(call: Callable[[], object]) -> None:
    """Call the method that removes something, unless another test process does it."""
    try:
        call()
    except APIError as error:
        if error.status_code not in _SWEPT_BY_ANOTHER:
            raise


def unique_name() -> str:
    """Return a name for a container or stack of this process, which `sweep` recognizes."""
    return f"tandem-test-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"


def is_orphan(name: str) -> bool:
    """Return True if `name` is from `unique_name` of a process of this machine that has ended."""
    owner = _NAME.match(name)
    return owner is not None and not psutil.pid_exists(int(owner[1]))
