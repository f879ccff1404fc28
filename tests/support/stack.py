"""The compose stack of this checkout, with helpers for tests."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from docker.models.containers import Container

from tandem_cli.testing import PROJECT_LABEL, TandemStack

ROOT = Path(__file__).parents[2]


class Stack(TandemStack):
    """A `TandemStack` of this checkout. With `stack`, unlike with `with Stack(...)`, the test starts it."""

    def __init__(self, project: Path | str = "examples/digits", *, checkout: Path = ROOT, **options: Any) -> None:
        super().__init__(project, checkout=checkout, **options)

    def python(self, service: str, code: str) -> str:
        """Run Python `code` in a running service and return what it prints."""
        return self.must("exec", "-T", service, "python3", "-c", code)

    def wait_for_log(self, service: str, pattern: str) -> str:
        """Wait until a service has logged a line with `pattern`, and return the pattern's first group."""
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, self.logs(service))):
            assert time.monotonic() < deadline, f"no {pattern} in the log of {service}: {self.logs(service)}"
            time.sleep(0.2)
        return found[1]

    def use_project(self, project: Path) -> None:
        """Train another project from the next `up` on."""
        self._environment["TANDEM_PROJECT"] = str(project)

    def run_script(self, script: Path, *arguments: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a script that uses `docker compose`, with its output in `log`, and do not wait for it."""
        files = ":".join(str(self._checkout / name) for name in self.files)
        return subprocess.Popen(
            [script, *arguments],
            cwd=self._checkout,
            env={**self._environment, "COMPOSE_PROJECT_NAME": self.name, "COMPOSE_FILE": files},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def running(self) -> list[Container]:
        """Return all containers of the services that run."""
        return list(self.engine.containers.list(filters={"label": f"{PROJECT_LABEL}={self.name}"}, ignore_removed=True))

    def leftovers(self) -> list[str]:
        """Return the names of all containers, volumes and networks of this stack."""
        own = {"label": f"{PROJECT_LABEL}={self.name}"}
        return [
            *(c.name for c in self.engine.containers.list(all=True, filters=own, ignore_removed=True)),
            *(v.name for v in self.engine.volumes.list(filters=own)),
            *(n.name for n in self.engine.networks.list(filters=own)),
        ]


def set_steps(project: Path, steps: int) -> None:
    """Change max_steps of the project of tests/deployment/conftest.py."""
    config = project / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 4", f"max_steps: {steps}"))


@contextmanager
def stack(project: Path | str = "examples/digits", **options: Any) -> Iterator[Stack]:
    """Create a stack that the test starts itself, and remove it afterwards."""
    made = Stack(project, **options)
    try:
        yield made
    finally:
        made.stop()
