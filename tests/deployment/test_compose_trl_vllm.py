"""The TRL example learns under Compose with vLLM on the CPU, as examples/digits does with Tandem's own trainer."""

from __future__ import annotations

from statistics import mean

import pytest

from support.stack import stack

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("cpu_images"),
]


def test_the_unmodified_script_learns() -> None:
    with stack("examples/trl", engine="vllm", variables={"TANDEM_SCRIPT": "train.py --max_steps 45"}) as made:
        made.must("build", "trainer", timeout_s=600)
        made.must("up", "--no-build", "--exit-code-from", "trainer", timeout_s=600)
        rewards = [record["reward_mean"] for record in made.metrics()]
    assert len(rewards) == 45
    assert mean(rewards[-10:]) > mean(rewards[:10]) + 0.3
