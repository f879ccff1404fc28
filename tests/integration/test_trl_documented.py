"""Scripts in the style of TRL's documentation, which nobody wrote for a machine without GPUs, run unmodified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import trl
from support.script_runs import Run

pytestmark = pytest.mark.trl
SCRIPTS = Path(trl.__file__).with_name("trl_documented")


def finished(folder: Path, model: Path, name: str, *options: str) -> Run:
    """Run the script `name` to its end."""
    (folder / "train.py").write_text((SCRIPTS / f"{name}.py").read_text())
    (folder / "model").symlink_to(model)
    run = Run(folder, *options, "train.py")
    assert run.finish()[0] == 0, run.errors
    return run


def test_with_default_precision_and_logging_the_last_step_is_logged_with_weighted_rewards(tmp_path: Path, model: Path):
    run = finished(tmp_path, model, "conversations")
    (record,) = run.records()
    assert (record["step"], record["version"], record["max_steps"]) == (3, "2.1", 3)
    assert record["reward_mean"] == record["reward"] > 0
    rows = run.records("rollouts")
    assert len(rows) == 4
    for row in rows:
        form, math, asynchronous = (row["rewards"][name] for name in ("format_reward", "math_reward", "async_reward"))
        assert row["reward"] == pytest.approx(0.5 * form + (math or 0.0) + 2.0 * asynchronous)


def test_two_processes_share_the_batch_and_one_folder(tmp_path: Path, model: Path):
    run = finished(tmp_path, model, "conversations", "--processes", "2")
    (record,) = run.records()
    assert round(record["rollout_tokens"] / record["completion_tokens_mean"]) == 2 * 8 * 3, "ranks × rows × steps"
    status = json.loads((tmp_path / "runs/train/status.json").read_text())
    assert (status["phase"], status["version"]) == ("finished", "3.1")


def test_an_adapter_is_trained_with_several_updates_per_batch_evaluated_and_resumed(tmp_path: Path, model: Path):
    run = finished(tmp_path, model, "adapters")
    assert [record["step"] for record in run.records()] == [2, 4, 5]
    assert [record["step"] for record in run.records("eval")] == [2, 4, 5]
    status = json.loads((tmp_path / "runs/train/status.json").read_text())
    assert (status["phase"], status["version"]) == ("finished", "5.2"), "the second trainer is a second attempt"


def test_trainers_other_than_grpo_sample_from_the_generators_too(tmp_path: Path, model: Path):
    run = finished(tmp_path, model, "distillation")
    assert [(record["step"], record["version"]) for record in run.records()] == [(1, "0.2"), (2, "1.2")]
    first = [json.loads(line) for line in (tmp_path / "runs/train/metrics.1.jsonl").read_text().splitlines()]
    assert [record["version"] for record in first] == ["0.1", "1.1"]
    assert first[0]["reward_mean"] > 0
