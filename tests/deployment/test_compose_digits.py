"""`docker compose up` as it stands: vLLM on the CPU learns examples/digits."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
import yaml

from support.stack import ROOT, stack

MAX_STEPS = yaml.safe_load((ROOT / "examples/digits/config.yaml").read_text())["trainer"]["max_steps"]
pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(2400)]


def test_the_stack_learns_and_ends(cpu_images: dict[str, str], tmp_path: Path) -> None:
    with stack(**cpu_images) as made:
        made.must("up", "--no-build", "--exit-code-from", "trainer", timeout_s=1800)
        lines = (made.copy_runs(tmp_path / "runs") / "digits" / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward_mean"] for line in lines]
    assert len(rewards) == MAX_STEPS
    assert mean(rewards[-10:]) > mean(rewards[:10]) + 0.3
