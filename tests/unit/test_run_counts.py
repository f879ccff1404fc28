"""What a run reports about groups that the queue replaced or asked for again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.rollouts import completion, scored, trajectory
from support.run_folders import events, make_run
from tandem_rollout.dispatch import Loads
from tandem_rollout.pool import Counts
from tandem_trainer.run.metrics import load_fields

PAIR = [completion([5, 6]), completion([7])]
WITH, WITHOUT = scored([4], PAIR, [1.0, 0.0]), scored([4], PAIR, [1.0, 1.0])
REFILL: dict[str, Any] = {"rollout": {"refill": True}}


def _record(folder: Path, counts: Counts) -> dict[str, Any]:
    run = make_run(folder)
    run.make_record(1, [WITH], {}, counts)
    run.log()
    (line,) = (run.dir / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)  # a line of JSON


def test_a_record_has_the_counts_of_its_step(tmp_path: Path) -> None:
    record = _record(tmp_path, Counts(refilled=3, reasked=2))
    assert (record["refilled"], record["reasked"]) == (3, 2)


def test_a_record_has_the_load_of_the_generators_on_all_ranks(tmp_path: Path) -> None:
    here, there = Loads({"http://a": 5, "http://b": 0}, {"http://a": 0, "http://b": 9}), Loads({"http://a": 2}, {})
    assert load_fields([here, there]) == {
        "replica_tokens": {"http://a": 7, "http://b": 0},
        "replica_outstanding": {"http://a": 0, "http://b": 9},
    }
    run = make_run(tmp_path)
    run.loads = lambda: here
    run.make_record(1, [WITH], {})
    assert run.record
    assert run.record["replica_outstanding"] == here.outstanding
    assert "replica_tokens" not in _record(tmp_path / "other", Counts()), "the run has no generator"


def test_a_batch_that_refill_could_not_fill_raises_an_alert(tmp_path: Path) -> None:
    run = make_run(tmp_path, **REFILL)
    run.skip([WITHOUT])
    run.make_record(1, [WITH, WITHOUT], {})
    assert events(tmp_path) == [("refill_ended", 0), ("refill_ended", 1)]


def test_a_full_batch_raises_none(tmp_path: Path) -> None:
    run = make_run(tmp_path, **REFILL)
    run.make_record(1, [WITH], {})
    other = make_run(tmp_path / "other")
    other.skip([WITHOUT])
    assert not (run.dir / "events.jsonl").exists()
    assert not (other.dir / "events.jsonl").exists()


def test_failed_episodes_of_a_skipped_batch_count_for_the_next_step(tmp_path: Path) -> None:
    failed = trajectory([], status="failed", reason="the tool broke")
    mixed = WITHOUT.model_copy(update={"trajectories": (failed, WITHOUT.trajectories[0])})
    run = make_run(tmp_path, rollout={"tools": ["tools:f"]})
    run.skip([mixed, mixed])
    run.make_record(1, [WITH, mixed], {})
    assert run.record is not None
    assert run.record["episodes_failed"] == 3
    run.make_record(2, [WITH], {})
    assert run.record["episodes_failed"] == 0
