"""The TRL example learns under Compose with vLLM on the CPU, as examples/digits does with Tandem's own trainer."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import mean

import pytest

from support.stack import ROOT, stack

STEPS = 60
"""Those after which the test of examples/digits expects the same reward."""
pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("cpu_images"),
]


def test_the_unmodified_script_learns_to_the_reward_of_digits(tmp_path: Path, digits_model: Path) -> None:
    folder = tmp_path / "trl"
    shutil.copytree(ROOT / "examples/trl", folder, ignore=shutil.ignore_patterns("model", "runs", "__pycache__"))
    shutil.copytree(digits_model, folder / "model")
    with stack(folder, engine="vllm", variables={"TANDEM_SCRIPT": f"train.py --max_steps {STEPS}"}) as made:
        made.must("build", "trainer", timeout_s=600)
        made.must("up", "--no-build", "--exit-code-from", "trainer", timeout_s=900)
        rewards = [record["reward_mean"] for record in made.metrics()]
    assert len(rewards) == STEPS
    assert mean(rewards[:5]) <= 0.4
    assert mean(rewards[-5:]) >= 0.9
