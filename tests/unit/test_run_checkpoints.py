"""A run's checkpoints: complete at any time, written when they are due, and refused if they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.run_folders import GROUPS, IDENTITY, Saved, Unsaved, events, make_run
from tandem_rollout.errors import UserError
from tandem_trainer.run.checkpoint import CheckpointFailed, Checkpoints
from tandem_trainer.run.run import Run


def test_checkpoint_appears_complete_and_old_ones_are_deleted(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (9, 10, 100):
        checkpoints.begin(step)
        (checkpoints.staging(step) / "state.json").write_text(str(step))
        before = checkpoints.latest()
        assert before is None or before.name != f"{step:06d}"
        checkpoints.commit(step)
        latest = checkpoints.latest()
        assert latest is not None
        assert (latest / "state.json").read_text() == str(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000010", "000100"]


def test_best_checkpoint_is_kept_in_addition_to_the_newest(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        checkpoints.begin(step)
        checkpoints.commit(step, best=min(step, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002", "000003"]


def test_staging_folder_of_a_killed_process_is_not_a_checkpoint(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.begin(5)
    (checkpoints.staging(5) / "half").write_text("x")
    assert checkpoints.latest() is None
    checkpoints.begin(5)
    assert list(checkpoints.staging(5).iterdir()) == []


def _fail_after_step_3(run: Run, error: Exception) -> None:
    learner = Saved()
    run.resume(learner, learner)  # type: ignore[arg-type]  # has all methods that `resume` calls
    with run.checkpoint_on_failure(learner, learner):  # type: ignore[arg-type]
        run.make_record(3, GROUPS, {"loss": 0.25})
        raise error


def test_failed_run_resumes_from_its_last_complete_step(tmp_path: Path):
    with pytest.raises(OSError, match="the volume is gone"):
        _fail_after_step_3(make_run(tmp_path), OSError("the volume is gone"))
    again, learner = make_run(tmp_path), Saved()
    assert again.resume(learner, learner) == 3  # type: ignore[arg-type]
    assert learner.loaded
    (line,) = (tmp_path / "default" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 3
    assert json.loads(line)["timings"]["publish_s"] == 0.0


def test_run_that_fails_within_an_update_writes_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Saved, "completed_updates", None)
    with pytest.raises(OSError, match="no"):
        _fail_after_step_3(make_run(tmp_path), OSError("no"))
    assert not (tmp_path / "default" / "checkpoints").exists()


def test_run_that_fails_before_its_first_step_writes_no_checkpoint(tmp_path: Path):
    run, learner = make_run(tmp_path), Saved()
    with pytest.raises(OSError, match="no"), run.checkpoint_on_failure(learner, learner):  # type: ignore[arg-type]
        raise OSError("no")
    assert not (tmp_path / "default" / "checkpoints").exists()


def test_checkpoint_of_another_model_is_refused_with_both_values(tmp_path: Path):
    with pytest.raises(OSError, match="x"):
        _fail_after_step_3(make_run(tmp_path), OSError("x"))
    with pytest.raises(
        UserError, match=r'shared.model: "m" → "other", but the checkpoint holds.*another trainer.run_name'
    ):
        make_run(tmp_path, identity=IDENTITY | {"shared.model": "other"})


def test_checkpoint_is_due_after_the_best_evaluation_also_in_a_resumed_run(tmp_path: Path):
    saved: Any = Saved()

    def run() -> Run:
        return make_run(
            tmp_path,
            checkpoint={"keep_best": True, "every_steps": 5, "keep": 1},
            eval={"prompts": {"source": "held_out.jsonl"}, "every_steps": 1},
        )

    def step(run: Run, number: int, reward: float | None) -> bool:
        run.make_record(number, GROUPS, {"loss": 0.25})
        run.evaluated({"reward_mean": reward})
        if due := run.checkpoint_due(number):
            run.checkpoint(number, saved, saved)
        return due

    first = run()
    first.evaluated({"reward_mean": 9.0})  # of the initial policy, which is in no checkpoint
    assert [step(first, n, reward) for n, reward in [(1, 0.2), (2, 0.5), (3, 0.5), (4, None), (5, 0.1)]] == [
        True, True, False, False, True,
    ]  # fmt: skip
    again = run()
    again.resume(saved, saved)
    assert [step(again, n, reward) for n, reward in [(6, 0.4), (7, 0.5)]] == [False, False]
    again.checkpoint(7, saved, saved)
    kept = sorted((tmp_path / "default" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["000002", "000007"]
    assert json.loads((kept[-1] / "state.json").read_text())["best"] == {"step": 2, "reward_mean": 0.5}


def test_unreadable_checkpoint_is_reported_with_its_path(tmp_path: Path):
    with pytest.raises(OSError, match="x"):
        _fail_after_step_3(make_run(tmp_path), OSError("x"))
    (tmp_path / "default" / "checkpoints" / "000003" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"000003 cannot be read.*delete the checkpoint"):
        make_run(tmp_path)


def test_copy_of_a_checkpoint_with_another_name_is_ignored(tmp_path: Path):
    (tmp_path / "000020.bak").mkdir()
    assert Checkpoints(tmp_path, keep=1).latest() is None


def test_failed_checkpoint_raises_an_alert_and_is_retried_at_the_next_step(tmp_path: Path):
    run, learner = make_run(tmp_path, checkpoint={"every_steps": 2}), Unsaved()
    checkpoints = tmp_path / "default" / "checkpoints"
    due = []
    for step in (1, 2, 3, 4, 5):
        learner.error = Unsaved.error if step < 4 else None
        run.make_record(step, GROUPS, {"loss": 0.25})
        due.append(run.checkpoint_due(step))
        if due[-1]:
            run.checkpoint(step, learner, learner)  # type: ignore[arg-type]
        run.log()
        assert step >= 4 or not checkpoints.exists() or list(checkpoints.iterdir()) == []
    assert due == [False, True, True, True, False]
    assert events(tmp_path) == [("checkpoint_failed", 2), ("checkpoint_failed", 3)]
    assert [path.name for path in checkpoints.iterdir()] == ["000004"]
    lines = [json.loads(line) for line in (tmp_path / "default" / "metrics.jsonl").read_text().splitlines()]
    assert [line["checkpoint_failures"] for line in lines] == [0, 1, 2, 0, 0]


def test_run_fails_if_its_last_checkpoint_fails(tmp_path: Path):
    run, learner = make_run(tmp_path), Unsaved()
    run.make_record(9, GROUPS, {"loss": 0.25})
    with pytest.raises(CheckpointFailed, match="of step 9, cannot be written"), run.record_outcome():
        run.last_checkpoint(9, learner, learner)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "default" / "status.json").read_text())["phase"] == "failed"


def test_best_checkpoint_is_kept_although_changed_rewards_reset_the_best_reward(tmp_path: Path):
    saved: Any = Saved()
    options: dict[str, Any] = {
        "checkpoint": {"keep_best": True, "every_steps": 2, "keep": 1},
        "eval": {"prompts": {"source": "held_out.jsonl"}, "every_steps": 1},
    }

    def step(run: Run, number: int, reward: float) -> None:
        run.make_record(number, GROUPS, {"loss": 0.25})
        run.evaluated({"reward_mean": reward})
        run.checkpoint(number, saved, saved)

    run = make_run(tmp_path, **options)
    step(run, 1, 0.9)
    step(run, 2, 0.1)
    again = make_run(tmp_path, identity=IDENTITY | {"trainer.rewards": "other"}, **options)
    again.resume(saved, saved)
    again.make_record(3, GROUPS, {"loss": 0.25})
    again.checkpoint(3, saved, saved)
    names = [path.name for path in (tmp_path / "default" / "checkpoints").iterdir()]
    assert sorted(names) == ["000001", "000003"]
    step(again, 4, 0.2)
    assert [path.name for path in (tmp_path / "default" / "checkpoints").iterdir()] == ["000004"]
