"""An interrupted run loses no results and reports its state correctly."""

from __future__ import annotations

import json
import math
import os
import signal
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from support.run_folders import GROUPS, IDENTITY, Saved, Unsaved, make_run
from tandem_trainer.run.run import Run


def _records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "default" / name).read_text().splitlines()]


def test_a_run_stopped_before_its_last_version_was_published_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: None
):
    monkeypatch.setattr("tandem_trainer.run.stopping.STOP_GRACE_S", 0.0)
    saved: Any = Saved()
    run = make_run(tmp_path)
    run.stop_on_signals()
    with run.record_outcome():
        with run.checkpoint_on_failure(saved, saved):
            run.make_record(9, GROUPS, {"loss": 0.25})
            os.kill(os.getpid(), signal.SIGTERM)
            run.wait(Future[None]())  # publishing to a generator that does not answer
        run.last_checkpoint(9, saved, saved)
    assert json.loads((tmp_path / "default" / "status.json").read_text())["phase"] == "stopped"
    assert not run.is_done
    assert [line["step"] for line in _records(tmp_path)] == [9]
    again = make_run(tmp_path)
    assert again.finished is None
    again.resume(saved, saved)
    assert [line["step"] for line in _records(tmp_path)] == [9]


def _best(run: Run, learner: Any, step: int, reward: float) -> None:
    run.make_record(step, GROUPS, {"loss": 0.25})
    run.evaluated({"reward_mean": reward})
    if run.checkpoint_due(step):
        run.checkpoint(step, learner, learner)
    run.log()


def test_best_checkpoint_is_kept_until_a_better_one_is_on_disk(tmp_path: Path):
    learner: Any = Unsaved()
    options: dict[str, Any] = {
        "checkpoint": {"keep_best": True, "every_steps": 100, "keep": 1},
        "eval": {"prompts": {"source": "held_out.jsonl"}, "every_steps": 1},
    }
    run, folder = make_run(tmp_path, **options), tmp_path / "default" / "checkpoints"
    learner.error = None
    _best(run, learner, 1, 0.5)
    learner.error = OSError("no space")
    _best(run, learner, 2, 0.9)  # better, but its checkpoint fails
    learner.error = None
    _best(run, learner, 3, 0.4)
    assert sorted(path.name for path in folder.iterdir()) == ["000001", "000003"]
    assert json.loads((folder / "000003" / "state.json").read_text())["best"] == {"step": 1, "reward_mean": 0.5}
    _best(run, learner, 4, 0.6)
    assert [path.name for path in folder.iterdir()] == ["000004"]


def test_resumed_run_may_mark_its_evaluated_checkpoint_as_the_best(tmp_path: Path):
    saved: Any = Saved()
    options: dict[str, Any] = {
        "checkpoint": {"keep_best": True, "every_steps": 1, "keep": 1},
        "eval": {"prompts": {"source": "held_out.jsonl"}, "every_steps": 1},
    }
    run = make_run(tmp_path, **options)
    _best(run, saved, 1, 0.9)
    _best(run, saved, 2, 0.1)
    again = make_run(tmp_path, identity=IDENTITY | {"trainer.rewards": "other"}, **options)
    again.resume(saved, saved)
    again.evaluated({"reward_mean": 0.7})
    _best(again, saved, 3, 0.6)
    names = sorted(path.name for path in (tmp_path / "default" / "checkpoints").iterdir())
    assert names == ["000002", "000003"]


def test_non_finite_metrics_become_null_and_do_not_end_the_run(tmp_path: Path):
    saved: Any = Saved()
    run = make_run(tmp_path)
    run.make_record(3, GROUPS, {"kl_sampler": math.inf, "loss": math.nan})
    run.evaluated({"reward_mean": None, "rewards": {"a:b": -math.inf}})
    run.checkpoint(3, saved, saved)
    run.log()
    (before,) = _records(tmp_path)
    assert (before["kl_sampler"], before["loss"], before["eval"]["rewards"]) == (None, None, {"a:b": None})
    (tmp_path / "default" / "metrics.jsonl").unlink()  # as if the run had been killed before it wrote the file
    make_run(tmp_path).resume(saved, saved)
    (after,) = _records(tmp_path)
    timed = {"timings", "publish_timings", "tokens_per_s"}
    assert {k: v for k, v in after.items() if k not in timed} == {k: v for k, v in before.items() if k not in timed}


def test_writing_after_a_step_counts_for_the_time_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The timings of all steps must add up to the time of the run."""
    now = [100.0]
    monkeypatch.setattr("tandem_trainer.run.clock.time.monotonic", lambda: now[0])
    run = make_run(tmp_path)

    def completions(_: object) -> None:
        now[0] += 7.0

    monkeypatch.setattr(run.journal, "completions", completions)
    run.start_step()
    for step in (1, 2):
        run.make_record(step, GROUPS, {"loss": 0.25})
        run.log()
    assert [line["timings"]["other_s"] for line in _records(tmp_path)] == [0.0, 7.0]


def test_a_group_without_signal_in_a_trained_batch_is_written_as_skipped(tmp_path: Path):
    run = make_run(tmp_path)
    run.make_record(1, GROUPS, {"loss": 0.25})
    run.log()
    assert {line["row"]: line["skipped"] for line in _records(tmp_path, "rollouts.jsonl")} == {3: False, 4: True}
    assert [line["groups_skipped"] for line in _records(tmp_path)] == [1]


@pytest.mark.parametrize("is_logged", [True, False])
def test_failed_run_writes_the_record_of_its_last_step_once(tmp_path: Path, is_logged: bool):
    saved: Any = Saved()
    run = make_run(tmp_path)

    def fail() -> None:
        with run.checkpoint_on_failure(saved, saved):
            run.make_record(2, GROUPS, {"loss": 0.25})
            run.log()
            run.make_record(3, GROUPS, {"loss": 0.25})
            if is_logged:
                run.log()
            raise OSError("the generator is gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert [line["step"] for line in _records(tmp_path)] == [2, 3]
    make_run(tmp_path).resume(saved, saved)
    assert [line["step"] for line in _records(tmp_path)] == [2, 3]
