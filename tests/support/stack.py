"""The compose stack, under a project name of its own, so that tests do not meet each other or a person's stack."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import docker
import psutil
from docker.models.containers import Container

ROOT = Path(__file__).parents[2]
PROJECT_LABEL = "com.docker.compose.project"
PREFIX = "tandem-test"


class Stack:
    """One `docker compose` project; `env` are the variables of compose.yaml."""

    def __init__(self, **env: str) -> None:
        self.name = f"{PREFIX}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.env = env
        self.engine = docker.from_env(timeout=60)

    def compose(self, *arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run `docker compose` to its end, whatever that is."""
        return subprocess.run(
            ["docker", "compose", "--project-name", self.name, "--progress", "plain", *arguments],
            cwd=ROOT,
            env={**os.environ, **self.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    def must(self, *arguments: str, timeout_s: float = 300.0) -> str:
        """The output of a `docker compose` that has to succeed."""
        done = self.compose(*arguments, timeout_s=timeout_s)
        assert done.returncode == 0, f"docker compose {' '.join(arguments)} ended with {done.returncode}: {done.stdout}"
        return done.stdout

    def container(self, service: str) -> Container:
        (found,) = self.containers(service)
        return found

    def containers(self, service: str) -> list[Container]:
        """The replicas of a service, in the order of their numbers."""
        labels = [f"{PROJECT_LABEL}={self.name}", f"com.docker.compose.service={service}"]
        return sorted(self.engine.containers.list(all=True, filters={"label": labels}), key=lambda c: str(c.name))

    def python(self, service: str, code: str) -> str:
        """What `code` prints inside a running service."""
        return self.must("exec", "-T", service, "python3", "-c", code)

    def copy_runs(self, target: Path) -> Path:
        """Copy the runs volume here; the trainer may have ended."""
        self.must("cp", "trainer:/runs", str(target))
        return target

    def leftovers(self) -> list[str]:
        """Every container, volume and network that bears the project's name."""
        own = {"label": f"{PROJECT_LABEL}={self.name}"}
        return [
            *(c.name for c in self.engine.containers.list(all=True, filters=own)),
            *(v.name for v in self.engine.volumes.list(filters=own)),
            *(n.name for n in self.engine.networks.list(filters=own)),
        ]

    def down(self) -> None:
        self.must("down", "--volumes", "--timeout", "5")


def set_steps(project: Path, steps: int) -> None:
    """Give the project of tests/deployment/conftest.py another length."""
    config = project / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 4", f"max_steps: {steps}"))


@contextmanager
def stack(**env: str) -> Iterator[Stack]:
    """A stack that is gone afterwards."""
    made = Stack(**env)
    try:
        yield made
    finally:
        made.down()


def sweep() -> None:
    """Remove what test processes that were killed have left."""
    engine = docker.from_env(timeout=60)
    for container in engine.containers.list(all=True, filters={"label": PROJECT_LABEL}):
        if is_orphan(container.labels[PROJECT_LABEL]):
            container.remove(force=True, v=True)
    for resource in [*engine.networks.list(), *engine.volumes.list()]:
        if is_orphan((resource.attrs["Labels"] or {}).get(PROJECT_LABEL, "")):
            resource.remove()


def is_orphan(project: str) -> bool:
    with suppress(ValueError):
        return project.startswith(f"{PREFIX}-") and not psutil.pid_exists(int(project.split("-")[2]))
    return False
