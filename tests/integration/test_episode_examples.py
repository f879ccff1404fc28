"""The example of an episode with tools, on the real vLLM engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.demo import running_demo

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT_S = 900


def trained(name: str, folder: Path, steps: int) -> tuple[list[dict[str, Any]], ...]:
    """Train an example for a few steps. Returns its evaluations, the metrics of its steps, and some episodes."""
    project = folder / name
    shutil.copytree(EXAMPLES / name, project, ignore=shutil.ignore_patterns("model", "runs", "__pycache__"))
    overrides = [f"--trainer.max_steps={steps}", "--trainer.run_name=default"]
    with running_demo(project, *overrides, PYTHONPATH="") as demo:
        demo.process.communicate(timeout=TIMEOUT_S)
        assert demo.process.returncode == 0, demo.errors
        demo.wait_until_nothing_is_left()
    names = ("eval.jsonl", "metrics.jsonl", "rollouts.jsonl")
    evals, metrics, episodes = (
        [json.loads(line) for line in (demo.run_dir / one).read_text().splitlines()] for one in names
    )
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    assert evals[-1]["step"] == steps
    mismatches = [line["mismatch"] for line in metrics if line["mismatch"] is not None]
    assert mismatches
    assert max(mismatches) <= 1e-3, "float32 on both sides"
    assert {line["episodes_failed"] for line in metrics} == {0}
    return evals, metrics, episodes


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.vllm
def test_calculator_learns_to_call_its_tool_and_to_believe_it(tmp_path: Path) -> None:
    evals, metrics, episodes = trained("calculator", tmp_path, steps=12)
    assert evals[0]["reward_mean"] <= 0.3
    assert evals[-1]["reward_mean"] >= 0.6
    assert metrics[0]["reward_mean"] <= 0.4
    assert metrics[-1]["tool_calls"] > metrics[0]["tool_calls"]
    best = [[message["role"] for message in one["messages"]] for one in episodes if one["reward"] == 1.0]
    assert ["user", "assistant", "tool", "assistant"] in best
