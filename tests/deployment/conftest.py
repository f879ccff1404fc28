"""Images and a project for the tests of the deployment."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import podman
from support.projects import write_project
from support.stack import Stack, sweep

MOCK = {"TANDEM_GENERATOR_TARGET": "mock"}


@pytest.fixture(scope="session")
def mock_images() -> dict[str, str]:
    """The variables of a stack with the mock generator, whose images are built."""
    sweep()
    Stack(**MOCK).must("build", timeout_s=1800)
    return MOCK


@pytest.fixture(scope="session")
def cpu_images() -> dict[str, str]:
    """The variables of a stack with vLLM on the CPU, whose images are built."""
    sweep()
    Stack().must("build", timeout_s=1800)
    return {}


@pytest.fixture(scope="session")
def mock_pods(mock_images: dict[str, str]) -> None:
    """Images of the pods with the mock generator are in podman's store."""
    podman.sweep()
    podman.load_images("tandem-generator:mock", "tandem-trainer:cpu")


@pytest.fixture(scope="session")
def cpu_pods(cpu_images: dict[str, str]) -> None:
    """Images of the pods with vLLM on the CPU are in podman's store."""
    podman.sweep()
    podman.load_images("tandem-generator:cpu", "tandem-trainer:cpu")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that the mock engine has something to learn from."""
    return write_project(tmp_path / "project")
