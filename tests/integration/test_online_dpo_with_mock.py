"""Online DPO with a real trainer process. It shares transport, ranks and resumption with GRPO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from support.projects import Project

JUDGE = """
import os, signal

calls = 0


def more_ones(completions, **_):
    global calls
    calls += 1
    if str(calls) == os.environ.get("KILL_AT_CALL"):
        os.kill(os.getpid(), signal.SIGKILL)
    ones = [[text.count("1") + len(text) / 100 for text in pair] for pair in completions]
    return [None if first == second else int(second > first) for first, second in ones]
"""


@pytest.fixture
def make_judged(make_project: Any) -> Any:
    def make(name: str = "project", **trainer: Any) -> Project:
        pairs = {"num_prompts": 4, "num_generations": 2, "max_completion_length": 12}
        online_dpo = {"judge": "judge:more_ones", "missing_eos_penalty": 0.5}
        project: Project = make_project(
            name, algorithm="online_dpo", rewards=[], rollout=pairs, online_dpo=online_dpo, **trainer
        )
        (project.directory / "judge.py").write_text(JUDGE)
        return project

    return make


def test_training_uses_pairs_of_older_policies_and_evaluation_reports_the_win_rate(make_judged: Any):
    project = make_judged(max_steps=5, max_lag=2, eval={"prompts": {}, "every_steps": 5})
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    metrics = project.lines("metrics.jsonl")
    assert max(line["lag_max"] for line in metrics) == 2
    assert metrics[0]["loss"] == pytest.approx(math.log(2)), "at first the policy equals the reference"
    assert metrics[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert all(line["kl_reference"] > 0 for line in metrics[1:])
    start, end = project.lines("eval.jsonl")
    assert (start["step"], start["reward_mean"], start["rewards"]) == (0, 0.5, {"judge:more_ones": 0.5})
    assert (end["step"], end["n"]) == (5, 9)


def test_a_killed_run_resumes_bit_for_bit(make_judged: Any):
    undisturbed = make_judged("undisturbed", max_steps=4)
    killed = make_judged("killed", max_steps=4)
    assert undisturbed.train().returncode == 0
    assert killed.train(KILL_AT_CALL="13").returncode == -9
    ended = killed.train()
    assert ended.returncode == 0, ended.stderr
    ours, theirs = killed.parameters(4), undisturbed.parameters(4)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_learn_the_same_as_one(make_judged: Any):
    one, two = (make_judged(name, max_steps=3, prompts={"shuffle": False}) for name in ("one", "two"))
    for project, ranks in ((one, 1), (two, 2)):
        ended = project.train(ranks=ranks)
        assert ended.returncode == 0, ended.stderr
    for ours, theirs in zip(two.lines("metrics.jsonl"), one.lines("metrics.jsonl"), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "kl_reference", "rollout_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name
