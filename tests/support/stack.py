"""The compose stack of this checkout, and what tests ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tandem_cli.testing import PROJECT_LABEL, TandemStack

ROOT = Path(__file__).parents[2]


class Stack(TandemStack):
    """Not up yet in the `with` block of `stack`."""

    def __init__(self, project: Path | str = "examples/digits", *, checkout: Path = ROOT, **options: Any) -> None:
        super().__init__(project, checkout=checkout, **options)

    def python(self, service: str, code: str) -> str:
        """What `code` prints inside a running service."""
        return self.must("exec", "-T", service, "python3", "-c", code)

    def leftovers(self) -> list[str]:
        """Every container, volume and network that bears the project's name."""
        own = {"label": f"{PROJECT_LABEL}={self.name}"}
        return [
            *(c.name for c in self.engine.containers.list(all=True, filters=own)),
            *(v.name for v in self.engine.volumes.list(filters=own)),
            *(n.name for n in self.engine.networks.list(filters=own)),
        ]


def set_steps(project: Path, steps: int) -> None:
    """Give the project of tests/deployment/conftest.py another length."""
    config = project / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 4", f"max_steps: {steps}"))


@contextmanager
def stack(project: Path | str = "examples/digits", **options: Any) -> Iterator[Stack]:
    """A stack that the test brings up, and that is gone afterwards."""
    made = Stack(project, **options)
    try:
        yield made
    finally:
        made.stop()
