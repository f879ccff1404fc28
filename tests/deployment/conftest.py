"""Images and a project for the tests of the deployment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import podman
from support.projects import write_project
from support.stack import ROOT, Stack
from tandem_cli.testing import sweep


@pytest.fixture(scope="session")
def mock_images() -> None:
    """Build the images of a stack with the mock generator."""
    _build("mock")


@pytest.fixture(scope="session")
def cpu_images() -> None:
    """Build the images of a stack with vLLM on the CPU."""
    _build("vllm")


def _build(engine: str) -> None:
    sweep()
    Stack(engine=engine).must("build", timeout_s=1800)


@pytest.fixture(scope="session")
def mock_pods(mock_images: None) -> None:
    """Load the images of pods with the mock generator into podman."""
    podman.sweep()
    podman.load_images("tandem-generator:mock", "tandem-trainer:cpu")


@pytest.fixture(scope="session")
def cpu_pods(cpu_images: None) -> None:
    """Load the images of pods with vLLM on the CPU into podman."""
    podman.sweep()
    podman.load_images("tandem-generator:cpu", "tandem-trainer:cpu")


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of examples/digits, which is also that of examples/trl. To create it takes about a minute."""
    folder = tmp_path_factory.mktemp("digits")
    shutil.copy(ROOT / "examples/digits/prepare.py", folder)
    subprocess.run([sys.executable, "prepare.py"], cwd=folder, check=True, timeout=600)
    return folder / "model"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a reward that differs between the mock engine's completions."""
    return write_project(tmp_path / "project")
