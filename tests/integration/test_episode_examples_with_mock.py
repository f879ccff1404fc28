"""The examples of an environment class and of an agent library, trained for two steps with a script for the policy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.agent_libraries import AGENTS
from support.demo import running_demo

EXAMPLES = Path(__file__).parents[2] / "examples"
PYTHONPATH = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(AGENTS)]))
TIMEOUT_S = 300


@pytest.fixture
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an example, with its prompts and a model that has hardly been trained."""
    folder = tmp_path / request.param
    shutil.copytree(EXAMPLES / request.param, folder, ignore=shutil.ignore_patterns("model", "runs", "__pycache__"))
    prepare = "import prepare; prepare.STEPS = 1; prepare.main()"
    subprocess.run([sys.executable, "-c", prepare], cwd=folder, check=True)
    return folder


def trained(project: Path, script: list[dict[str, Any]], *overrides: str) -> tuple[list[dict[str, Any]], ...]:
    """Train an example with this script for the policy. Returns the metrics of its steps, and some episodes."""
    (project / "script.jsonl").write_text("".join(json.dumps(row) + "\n" for row in script))
    run = (
        *("--trainer.max_steps=2", "--trainer.run_name=default", "--generator.mock.script=script.jsonl"),
        *("--trainer.rollout.num_prompts=8", "--trainer.eval.prompts.limit=8"),
    )
    with running_demo(project, "--engine=mock", *run, *overrides, PYTHONPATH=PYTHONPATH) as demo:
        demo.process.communicate(timeout=TIMEOUT_S)
        assert demo.process.returncode == 0, demo.errors
        demo.wait_until_nothing_is_left()
    names = ("metrics.jsonl", "rollouts.jsonl")
    metrics, episodes = ([json.loads(line) for line in (demo.run_dir / one).read_text().splitlines()] for one in names)
    assert [line["step"] for line in metrics] == [1, 2]
    assert {line["episodes_failed"] for line in metrics} == {0}
    assert episodes
    return metrics, episodes


@pytest.mark.parametrize("project", ["game"], indirect=True)
def test_only_whoever_follows_all_hints_of_the_game_gets_the_full_reward(project: Path) -> None:
    moves = {"north": "south", "south": "north", "west": "east", "east": "west"}
    script = [
        {"regex": rf"It is {hint}\.<end><assistant>$", "samples": [[hint], [hint], [away]]}
        for hint, away in moves.items()
    ]
    metrics, episodes = trained(project, script)
    assert all(line["turns_mean"] > 1 for line in metrics)
    for one in episodes:
        hints = [message["content"] for message in one["messages"] if message["role"] == "user"]
        walked = [message["content"] for message in one["messages"] if message["role"] == "assistant"]
        followed = [f"It is {move}." in hint for hint, move in zip(hints, walked, strict=True)]
        assert one["rewards"] == {"Treasure": one["reward"]}
        assert all(followed) == (one["reward"] == 1.0)


@pytest.mark.agents
@pytest.mark.parametrize("project", ["agent"], indirect=True)
def test_the_agent_rewards_the_right_colleague_with_the_right_call(project: Path) -> None:
    lines = (project / "prompts.jsonl").read_text().splitlines()
    few = [json.loads(line) for line in lines[:4] + lines[-4:]]  # sums and words
    (project / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    script = [{"prompt": one, "samples": [right(one), WRONG]} for one in (row["prompt"][0]["content"] for row in few)]
    metrics, episodes = trained(
        project, script, "--trainer.prompts.source=few.jsonl", "--trainer.eval.prompts.source=few.jsonl"
    )
    assert all(1 < line["turns_mean"] <= 2 for line in metrics)
    for one in episodes:
        assert one["rewards"] == {"agent:run": float("transfer_to_nobody" not in json.dumps(one["messages"]))}


WRONG = ['<tool_call>{"name": "transfer_to_nobody", "arguments": {}}</tool_call>']


def right(question: str) -> list[str]:
    """Return what the policy says to answer a question."""
    words = question.rstrip(".?").split()
    if words[0] == "Spell":
        calls = [{"name": "transfer_to_words", "arguments": {}}, {"name": "reverse", "arguments": {"word": words[1]}}]
    else:
        numbers = {"a": int(words[2]), "b": int(words[4])}
        calls = [{"name": "transfer_to_numbers", "arguments": {}}, {"name": "add", "arguments": numbers}]
    return [f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls]
