"""The example of Online DPO, examples/judge, with the real vLLM engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.demo import running_demo

JUDGE = Path(__file__).parents[2] / "examples" / "judge"
STEPS = 50
"""Half of the example's."""
TIMEOUT_S = 900


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.vllm
def test_the_judge_prefers_the_trained_policy_to_the_initial_one(tmp_path: Path) -> None:
    project = tmp_path / "judge"
    project.mkdir()
    for name in ("config.yaml", "judge.py", "prepare.py"):
        shutil.copy(JUDGE / name, project)
    overrides = [f"--trainer.max_steps={STEPS}", f"--trainer.eval.every_steps={STEPS}", "--trainer.run_name=default"]
    with running_demo(project, *overrides, PYTHONPATH="") as demo:
        demo.process.communicate(timeout=TIMEOUT_S)
        assert demo.process.returncode == 0, demo.errors
        wins = [json.loads(line)["reward_mean"] for line in (demo.run_dir / "eval.jsonl").read_text().splitlines()]
        demo.wait_until_nothing_is_left()
    assert wins[0] == 0.5
    assert wins[-1] >= 0.8
