"""Projects that train on a mock generator of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.generators import running
from support.models import make_tiny_model
from support.projects import Project


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_project(tmp_path: Path, model: Path) -> Iterator[Callable[..., Project]]:
    """A project with its own generator and store: the mock follows attempts, so runs must not share one."""
    with contextlib.ExitStack() as stack:

        def make(name: str = "project", faults: tuple[str, ...] = (), **trainer: Any) -> Project:
            weights_dir = tmp_path / name / "weights"
            weights_dir.mkdir(parents=True)
            generator = stack.enter_context(
                running("mock", model, weights_dir, *faults, log=tmp_path / name / "generator.log")
            )
            return Project(tmp_path / name / "project", model, generator, weights_dir, **trainer)

        yield make
