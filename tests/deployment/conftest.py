"""Images and a project for the tests of the deployment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from support.models import make_tiny_model
from support.projects import REWARDS
from support.stack import Stack
from tandem_cli.testing import sweep


@pytest.fixture(scope="session")
def mock_images() -> None:
    """The images of a stack with the mock generator."""
    _build("mock")


@pytest.fixture(scope="session")
def cpu_images() -> None:
    """The images of a stack with vLLM on the CPU."""
    _build("vllm")


def _build(engine: str) -> None:
    sweep()
    Stack(engine=engine).must("build", timeout_s=1800)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that the mock engine has something to learn from."""
    folder = tmp_path / "project"
    make_tiny_model(folder / "model")
    config = {
        "shared": {"model": "model"},
        "generator": {"engine": "vllm"},
        "trainer": {
            "max_steps": 4,
            "rewards": [{"function": "odd_rewards:odd"}],
            "rollout": {"num_prompts": 2, "num_generations": 4, "max_completion_length": 12},
            "checkpoint": {"every_steps": 2},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "odd_rewards.py").write_text(REWARDS)
    rows = ({"prompt": f"{i}+{j}="} for i in range(3) for j in range(3))
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder
