"""The examples of episodes, with the real vLLM engine: tools, an environment class, and an agent library."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.demo import running_demo

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT_S = 400


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


@pytest.mark.vllm
def test_calculator_learns_to_call_its_tool_and_to_believe_it(tmp_path: Path) -> None:
    evals, metrics, episodes = trained("calculator", tmp_path, steps=20)
    assert evals[0]["reward_mean"] <= 0.3
    assert evals[-1]["reward_mean"] >= 0.6
    assert metrics[0]["reward_mean"] <= 0.4
    assert metrics[-1]["tool_calls"] > metrics[0]["tool_calls"]
    best = [one for one in episodes if one["reward"] == 1.0]
    assert any(
        [message["role"] for message in one["messages"]] == ["user", "assistant", "tool", "assistant"] for one in best
    )


@pytest.mark.vllm
def test_game_is_trained_on_episodes_of_several_turns(tmp_path: Path) -> None:
    _, metrics, episodes = trained("game", tmp_path, steps=3)
    assert metrics[0]["turns_mean"] > 1
    assert all(one["rewards"] == {"Treasure": one["reward"]} for one in episodes)
    assert all(one["messages"][0]["content"].startswith("Find the treasure. It is ") for one in episodes)


@pytest.mark.vllm
@pytest.mark.skipif(not importlib.util.find_spec("agents"), reason="examples/agent/requirements.txt is not installed")
def test_agent_is_trained_on_the_calls_of_its_library(tmp_path: Path) -> None:
    _, metrics, episodes = trained("agent", tmp_path, steps=3)
    assert metrics[0]["turns_mean"] > 1
    assert all(one["rewards"] == {"agent:run": one["reward"]} for one in episodes)
