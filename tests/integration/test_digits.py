"""The first example that a new user runs: examples/digits with the real vLLM engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.demo import running_demo

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
STEPS = 60
TIMEOUT_S = 900


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.vllm
def test_digits_learns_to_sort(tmp_path: Path) -> None:
    project = tmp_path / "digits"
    project.mkdir()
    for name in ("config.yaml", "rewards.py", "prepare.py"):
        shutil.copy(DIGITS / name, project)
    overrides = [f"--trainer.max_steps={STEPS}", "--trainer.run_name=default"]
    with running_demo(project, *overrides, PYTHONPATH="") as demo:
        demo.process.communicate(timeout=TIMEOUT_S)
        assert demo.process.returncode == 0, demo.errors
        evals, steps = (
            [json.loads(line) for line in (demo.run_dir / name).read_text().splitlines()]
            for name in ("eval.jsonl", "metrics.jsonl")
        )
        demo.wait_until_nothing_is_left()
    assert evals[0]["reward_mean"] <= 0.4
    assert evals[-1]["step"] == STEPS
    assert evals[-1]["reward_mean"] >= 0.9
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert {step["lag_max"] for step in steps} <= {0, 1}
    on_policy = [step["kl_sampler"] for step in steps if step["lag_max"] == 0]
    assert on_policy[0] == pytest.approx(0.0, abs=1e-6), "sampler and trainer start with the same policy"
    mismatches = [step["mismatch"] for step in steps if step["mismatch"] is not None]
    assert mismatches
    assert max(mismatches) <= 1e-3, "float32 on both sides"
