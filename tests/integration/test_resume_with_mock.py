"""Changed settings take effect when a run resumes, and two trainers never share a folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.forked import start_trainer
from support.projects import Project

EVEN = """
def even(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
"""
DEADLINE_S = 60.0


def _change(project: Project, **trainer: Any) -> None:
    """Edit the project's configuration file, as a user would."""
    file = project.directory / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["trainer"] |= trainer
    file.write_text(yaml.safe_dump(config))


def _events(project: Project, kind: str) -> list[dict[str, Any]]:
    return [event for event in project.lines("events.jsonl") if event["kind"] == kind]


def test_a_run_resumes_with_changed_settings_and_other_rewards(make_project: Any):
    project = make_project(max_lag=2, max_steps=6)
    assert project.train(ACTION="SIGTERM", AT_CALL="5").returncode == 143
    before = project.steps
    queue = project.rollouts(before[-1])["queue"]
    assert sum(len(pending["scored"]) for pending in queue) >= 2, (
        "the queue must hold groups that the old rewards scored"
    )

    (project.directory / "even_rewards.py").write_text(EVEN)
    rewards = [{"function": "odd_rewards:odd"}, {"function": "even_rewards:even", "weight": 3.0}]
    _change(project, rewards=rewards, optim={"learning_rate": 1e-2, "weight_decay": 0.1})
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    assert project.steps == [1, 2, 3, 4, 5, 6]
    (changed,) = [line for line in ended.stdout.splitlines() if f"changed since step {before[-1]}: " in line]
    assert "trainer.optim.learning_rate: 0.001 → 0.01" in changed
    for line in project.lines("metrics.jsonl"):
        is_new = line["step"] > before[-1]
        assert line["learning_rate"] == (1e-2 if is_new else 1e-3)
        odd = line["rewards"]["odd_rewards:odd"]
        even = line["rewards"].get("even_rewards:even")
        assert line["reward_mean"] == pytest.approx(odd + 3 * even if is_new else odd)
        assert not is_new or odd + even == pytest.approx(1.0)
    (event,) = _events(project, "settings_changed")
    assert event["changes"]["trainer.optim.weight_decay"] == [0.0, 0.1]


def test_a_finished_run_reports_so_and_changed_settings_have_no_effect(make_project: Any):
    project = make_project(max_steps=2)
    assert project.train().returncode == 0
    metrics = project.lines("metrics.jsonl")
    resolved = (project.run_dir / "config.resolved").read_text()
    _change(project, optim={"learning_rate": 1.0}, rewards=[{"function": "no_such:function"}])
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    assert "is finished: step 2 of trainer.max_steps 2." in ended.stdout
    assert "changed settings had no effect" in ended.stdout
    assert project.lines("metrics.jsonl") == metrics
    assert (project.run_dir / "config.resolved").read_text() == resolved
    _change(project, optim={"learning_rate": 1e-3}, rewards=[{"function": "odd_rewards:odd"}], max_steps=3)
    assert project.train().returncode == 0
    assert project.steps == [1, 2, 3]


def test_a_second_trainer_in_the_same_folder_is_refused_and_the_first_is_named(make_project: Any):
    project = make_project(max_steps=1_000_000, log_completions=0)
    first = start_trainer(project.directory / "config.yaml", project.directory / "first.log")
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not (project.run_dir / "metrics.jsonl").exists():
            assert first.is_alive(), (project.directory / "first.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for other in ([], ["--shared.weights_dir=other-weights"]):
            second = project.train(*other)
            assert second.returncode == 2
            assert f"is in use by run default, pid {first.pid} on " in second.stderr
            assert "Traceback" not in second.stderr
        first.terminate()
        first.join(DEADLINE_S)
        assert first.exitcode == 143, (project.directory / "first.log").read_text()
    finally:
        first.kill()
    assert project.steps == [*range(1, project.steps[-1] + 1)]
    assert {line["version"].split(".")[1] for line in project.lines("metrics.jsonl")} == {"1"}


SABOTAGE = """
import shutil
from pathlib import Path

CHECKPOINTS = Path("runs/default/checkpoints")
calls = 0


def odd(completion_ids, **_):
    global calls
    calls += 1
    if calls == 3:  # step 2
        CHECKPOINTS.rename(CHECKPOINTS.with_name("hidden")) if CHECKPOINTS.exists() else None
        CHECKPOINTS.write_text("in the way")
    if calls == 7:  # step 4
        CHECKPOINTS.unlink()
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
"""


def test_a_checkpoint_that_cannot_be_written_is_retried_at_every_step(make_project: Any):
    project = make_project(max_steps=5)
    Path(project.directory / "sabotage.py").write_text(SABOTAGE)
    _change(project, rewards=[{"function": "sabotage:odd"}])
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    assert [event["step"] for event in _events(project, "checkpoint_failed")] == [2, 3]
    assert [line["checkpoint_failures"] for line in project.lines("metrics.jsonl")] == [0, 1, 2, 0, 0]
    assert {path.name for path in (project.run_dir / "checkpoints").iterdir()} == {"000004", "000005"}
    assert "the checkpoint of step 2 cannot be written" in ended.stderr
    assert "Traceback" not in ended.stderr
