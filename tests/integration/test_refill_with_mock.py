"""With `rollout.refill`, every group of a step has a signal, with several processes and after a kill as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.projects import Project, course, make_projects

REWARDS = """
from odd_rewards import odd


def mostly_odd(completion_ids, **_):
    return [float(share > 0.5) for share in odd(completion_ids)]
"""
TRAINER = {
    "max_steps": 4,
    "rewards": [{"function": "coarse_rewards:mostly_odd"}],
    "rollout": {"num_prompts": 2, "num_generations": 3, "max_completion_length": 12, "refill": True},
}


@pytest.fixture(scope="module")
def make_project(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Callable[..., Project]]:
    with make_projects(tmp_path_factory.mktemp("projects"), model) as make:

        def with_rewards(name: str, **trainer: Any) -> Project:
            project = make(name, **TRAINER | trainer)
            (project.directory / "coarse_rewards.py").write_text(REWARDS)
            return project

        yield with_rewards


def _records(project: Project) -> list[dict[str, Any]]:
    return course(project.lines("metrics.jsonl"))


def _check(project: Project) -> None:
    records = _records(project)
    assert [record["groups_skipped"] for record in records] == [0] * 4
    assert sum(record["refilled"] for record in records) > 0
    assert max(record["lag_max"] for record in records) <= 2


def test_two_processes_refill_their_parts_and_a_killed_run_resumes_bit_for_bit(make_project: Any) -> None:
    undisturbed, killed = make_project("undisturbed"), make_project("killed")
    assert undisturbed.train(ranks=2).returncode == 0
    _check(undisturbed)
    assert killed.train(ranks=2, ACTION="SIGKILL", AT_CALL="4").returncode != 0
    assert killed.train(ranks=2).returncode == 0
    assert _records(killed) == _records(undisturbed)
    ours, theirs = killed.parameters(4), undisturbed.parameters(4)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_groups_are_replaced_with_lag(make_project: Any) -> None:
    project = make_project("lag", max_lag=2)
    ended = project.train(ranks=2)
    assert ended.returncode == 0, ended.stderr
    _check(project)
