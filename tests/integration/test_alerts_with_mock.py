"""A run with planted faults says so in events.jsonl: each alert once, also if it is resumed, and what went wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from support.run_folders import ROUTINE

REWARDS = '''
"""Scores two completions of each group, and finds no answer in the others."""


def odd(completion_ids, **_):
    return [float(index) if index < 2 else None for index in range(len(completion_ids))]
'''
FAULTS = ("--generator.mock.faults.drop_rate", "0.5", "--generator.mock.faults.load_failures", "1")


def test_a_run_with_planted_faults_reports_each_of_them_once(make_project: Any) -> None:
    project = make_project(
        max_steps=7,
        faults=FAULTS,
        rollout={"num_prompts": 2, "num_generations": 8, "max_completion_length": 2},
        eval={"prompts": {"limit": 2}},
    )
    Path(project.directory / "odd_rewards.py").write_text(REWARDS)
    first = project.train()
    assert first.returncode == 0, first.stderr
    second = project.train("--trainer.max_steps=9")
    assert second.returncode == 0, second.stderr

    events = project.lines("events.jsonl")
    alerts = [(event["kind"], event["step"], event["state"], event["level"]) for event in events if "state" in event]
    assert sorted(alerts) == [("reward_missing", 5, "raised", "warning"), ("truncated", 5, "raised", "warning")]
    assert all(line["alerts"] == {} for line in project.lines("metrics.jsonl")[:4])
    assert all(line["alerts"] == {"reward_missing": 5, "truncated": 5} for line in project.lines("metrics.jsonl")[4:])
    (missing,) = (event for event in events if event["kind"] == "reward_missing")
    assert missing["value"] == 0.75
    assert missing["page"] == "alerts.html#reward-missing"
    assert first.stderr.count(missing["message"]) == 1
    assert missing["message"] not in second.stderr

    kinds = Counter(event["kind"] for event in events)
    assert kinds >= Counter({"evaluation": 3, "resumed": 1, "settings_changed": 1, "finished": 2, "checkpoint": 2})
    assert kinds.keys() <= ROUTINE | {
        "reward_missing", "truncated", "settings_changed", "finished",
        "generator_lost", "generator_back", "switch_failed",
    }  # fmt: skip
    faults = [event for event in events if "generator" in event]
    assert [event["kind"] for event in faults[:3]] == ["switch_failed", "generator_back", "generator_lost"]
    assert len(faults) <= 2 * 4, "two starts, each with three lines and a last one"
    assert all(event["generator"].startswith("http://") for event in faults)
