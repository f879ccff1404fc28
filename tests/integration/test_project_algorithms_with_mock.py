"""Losses, advantages and algorithms of a project, with a real trainer process and the mock generator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.projects import Project, assert_same_course

CODE = '''
"""Learning code of a project. With `FAILS`, `fragile` raises on rank 0 after the first step."""
import os
from pathlib import Path

import torch

from tandem_trainer.algorithms import Algorithm, Mean, MicroBatchLoss, pad, rows_of


def clipped(logprobs_BT, old_logprobs_BT, advantages_BT, width):
    ratio_BT = (logprobs_BT - old_logprobs_BT).exp()
    bounded_BT = ratio_BT.clamp(1 - width, 1 + width)
    return -torch.min(ratio_BT * advantages_BT, bounded_BT * advantages_BT), {"mine": ratio_BT, "mine/max": ratio_BT}


def fragile(logprobs_BT, advantages_BT):
    if "FAILS" in os.environ and os.environ.get("RANK", "0") == "0" and Path("runs/default/metrics.jsonl").exists():
        raise KeyError("answer")
    return -advantages_BT * logprobs_BT


def mean(logprobs_BT, advantages_BT):
    return (-advantages_BT * logprobs_BT).mean()


def as_built_in(rewards_G):
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + 1e-4)


class BestOfN(Algorithm):
    def __init__(self, config, weight):
        self.weight = weight

    def make_batch(self, groups):
        scored = [[one for one in group.trajectories if one.in_loss] for group in groups]
        best = [max(of_group, key=lambda one: one.reward) for of_group in scored if of_group]
        rows = [row for one in best for row in rows_of(one, advantage=1.0)]
        return pad(rows, trajectory_total=len(best), token_total=sum(one.num_sampled for one in best))

    def loss(self, logprobs_BT, batch, totals):
        loss = -self.weight * (logprobs_BT * batch.mask_BT).sum() / max(1, totals.tokens)
        return MicroBatchLoss(loss, {"imitated": Mean.over(-logprobs_BT, batch.mask_BT)})
'''
SEVERAL = {"num_prompts": 4, "num_generations": 4, "max_completion_length": 12}
IN_ORDER = {"shuffle": False}


@pytest.fixture
def make(make_project: Any) -> Any:
    def make(name: str = "project", **trainer: Any) -> Project:
        project: Project = make_project(name, **{"max_steps": 3} | trainer)
        (project.directory / "learning.py").write_text(CODE)
        return project

    return make


def test_the_users_formulas_train_as_the_built_in_ones_on_one_rank_and_on_two(make: Any) -> None:
    options = {"num_iterations": 2, "epsilon": 0.02}
    theirs = {"loss_type": "learning:clipped", "loss_arguments": {"width": 0.02}, "advantage": "learning:as_built_in"}
    runs = [("built-in", {}, 1), ("ours", theirs, 1), ("two", theirs, 2)]
    lines = {}
    for name, grpo, ranks in runs:
        project = make(name, rollout=SEVERAL, prompts=IN_ORDER, grpo=options | grpo)
        ended = project.train(ranks=ranks)
        assert ended.returncode == 0, ended.stderr
        lines[name] = project.lines("metrics.jsonl")
    for name in ("ours", "two"):
        for ours, built_in in zip(lines[name], lines["built-in"], strict=True):
            for field in ("loss", "grad_norm", "reward_mean", "rollout_tokens"):
                assert ours[field] == pytest.approx(built_in[field], rel=1e-3, abs=1e-6), field
            assert ours["mine/max"] >= ours["mine"] > 0


def test_an_algorithm_of_the_project_trains_resumes_and_reports_its_metrics(make: Any) -> None:
    trainer = {"algorithm": "learning:BestOfN", "algorithm_arguments": {"weight": 2.0}}
    project, undisturbed = make("project", **trainer), make("undisturbed", **trainer)
    for steps in ("2", "3"):
        ended = project.train("--trainer.max_steps", steps)
        assert ended.returncode == 0, ended.stderr
    assert undisturbed.train().returncode == 0
    assert_same_course(project, undisturbed)
    for line in project.lines("metrics.jsonl"):
        assert line["loss"] == pytest.approx(2 * line["imitated"], rel=1e-5)
    start, end = (project.parameters(step) for step in (2, 3))
    assert any(not torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"grpo": {"loss_type": "learning:mean"}}, "loss learning:mean returned a tensor of shape [], expected"),
        ({"grpo": {"loss_type": "dapoo"}}, "Did you mean dapo?"),
    ],
    ids=str,
)
def test_a_mistake_ends_the_trainer_before_the_run_with_status_2(
    make: Any, trainer: dict[str, Any], message: str
) -> None:
    project = make(**trainer)
    ended = project.train()
    assert ended.returncode == 2, ended.stderr
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (project.run_dir / "metrics.jsonl").exists()


def test_a_loss_that_raises_on_one_of_two_ranks_ends_both_and_the_run_can_be_continued(make: Any) -> None:
    project = make(grpo={"loss_type": "learning:fragile"}, checkpoint={"every_steps": 1})
    ended = project.train(ranks=2, FAILS="1")
    assert ended.returncode == 2, ended.stderr
    assert "loss learning:fragile: KeyError: 'answer'" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert project.steps == [1]
    ended = project.train(ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert project.steps == [1, 2, 3]
