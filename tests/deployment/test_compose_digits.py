"""`docker compose up` with vLLM on the CPU learns examples/digits."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import mean

import pytest
import yaml

from support.stack import ROOT, stack

STEPS = 50
"""The reward is 0.1 at first and 0.7 after these steps."""
pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.usefixtures("cpu_images"),
]


def test_the_stack_learns_and_ends(tmp_path: Path, digits_model: Path) -> None:
    project = tmp_path / "digits"
    shutil.copytree(ROOT / "examples/digits", project, ignore=shutil.ignore_patterns("model", "runs", "__pycache__"))
    shutil.copytree(digits_model, project / "model")
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["trainer"]["max_steps"] = STEPS
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    with stack(project, engine="vllm") as made:
        made.must("up", "--no-build", "--exit-code-from", "trainer", timeout_s=1800)
        rewards = [record["reward_mean"] for record in made.metrics()]
    assert len(rewards) == STEPS
    assert mean(rewards[-10:]) > mean(rewards[:10]) + 0.3
