"""`docker compose up` with its defaults: vLLM on the CPU learns examples/digits."""

from __future__ import annotations

from statistics import mean

import pytest
import yaml

from support.stack import ROOT, stack

MAX_STEPS = yaml.safe_load((ROOT / "examples/digits/config.yaml").read_text())["trainer"]["max_steps"]
pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.usefixtures("cpu_images"),
]


def test_the_stack_learns_and_ends() -> None:
    with stack(engine="vllm") as made:
        made.must("up", "--no-build", "--exit-code-from", "trainer", timeout_s=1800)
        rewards = [record["reward_mean"] for record in made.metrics()]
    assert len(rewards) == MAX_STEPS
    assert mean(rewards[-10:]) > mean(rewards[:10]) + 0.3
