"""Learner and rollout side are threads of one process: each soon gets the interpreter that the other one uses."""

from __future__ import annotations

from typing import Any

REWARDS = """
import sys, threading


def interval(completion_ids, **_):
    return [sys.getswitchinterval() for _ in completion_ids]


def beside_the_learner(completion_ids, **_):
    return [float(threading.current_thread() is not threading.main_thread()) for _ in completion_ids]
"""


def test_reward_functions_run_beside_the_learner_and_soon_give_it_the_interpreter(
    make_project: Any,
) -> None:
    functions = [{"function": name} for name in ("odd_rewards:odd", "sharing:interval", "sharing:beside_the_learner")]
    project = make_project(max_steps=1, rewards=functions)
    project.forks = False
    (project.directory / "sharing.py").write_text(REWARDS)
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    for line in project.lines("rollouts.jsonl"):
        assert 0 < line["rewards"]["sharing:interval"] <= 1e-4
        assert line["rewards"]["sharing:beside_the_learner"] == 1
