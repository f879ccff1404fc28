"""Fixtures: a tiny model, and projects that each train with their own mock generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.models import make_tiny_model
from support.projects import Project, make_projects


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_project(tmp_path: Path, model: Path) -> Iterator[Callable[..., Project]]:
    with make_projects(tmp_path, model) as make:
        yield make
