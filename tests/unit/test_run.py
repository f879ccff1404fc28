"""A run's records, status, stopping and timings."""

from __future__ import annotations

import json
import logging
import os
import signal
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from support.rollouts import sequence, trajectory
from support.run_folders import GROUPS, IDENTITY, Saved, all_events, events, make_run
from tandem_protocol.version import Version
from tandem_rollout.errors import UserError
from tandem_rollout.trajectory import Group
from tandem_trainer.run.metrics import JsonLinesWriter, TrajectorySample, samples, step_record, trajectory_records
from tandem_trainer.run.stopping import Stopped


def test_resume_drops_lines_of_later_steps_and_a_truncated_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    file = JsonLinesWriter(path)
    file.forget_after(2)
    assert file.last_step() == 2
    file.append([{"step": 3}])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_step_record_holds_the_values_of_the_step():
    record = step_record(
        Version(3, 1),
        samples(GROUPS, 2),
        {"loss": 0.25, "grad_norm": 2.0, "kl_sampler": 0.125},
        functions=["rewards:r"],
        groups_skipped=1,
    )
    assert record == {
        "step": 3,
        "version": "3.1",
        "reward_mean": 0.5,
        "reward_std": (1 / 6) ** 0.5,
        "rewards": {"rewards:r": 0.5},
        "rewards_std": {"rewards:r": (1 / 6) ** 0.5},
        "mismatch": None,
        "loss": 0.25,
        "grad_norm": 2.0,
        "kl_sampler": 0.125,
        "lag_max": 2,
        "staleness": {"0": 3, "1": 1, "2": 1},
        "completion_tokens_mean": 1.25,
        "truncated_fraction": 0.25,
        "repetitive_fraction": 0.0,
        "reward_none_fraction": 0.25,
        "rewards_none_fraction": {"rewards:r": 0.25},
        "rollout_tokens": 5,
        "groups_skipped": 1,
    }


def test_logged_completions_include_one_of_each_group_first():
    records = trajectory_records(Version(3, 1), GROUPS, 3)
    assert [(r["row"], r["completion"], r["reward"]) for r in records] == [
        (3, "5 6", 1.0),
        (4, "8", None),
        (3, "7", 0.5),
    ]
    assert records[2]["status"] == "max_tokens"
    assert records[0]["versions"] == ["2.1"]


def test_the_record_of_an_episode_has_its_turns_and_a_transcript():
    call = {"id": "0", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "0", "name": "add", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    )
    episode = trajectory(
        [sequence([([4, 5], [6]), ([7], [8, 9])]), sequence([([4], [6])], version=Version(2, 1))],
        1.0, messages=messages, num_prompt_messages=2, turns=2, tool_calls=1, status="max_turns",
    )  # fmt: skip
    group = Group(row=3, trajectories=(episode, episode.model_copy(update={"reward": 0.0})))
    (record,) = trajectory_records(Version(3, 1), [group], 1)
    assert record == {
        "step": 3, "skipped": False, "row": 3, "reward": 1.0, "rewards": {"rewards:r": 1.0},
        "prompt": "system: Be brief.\nuser: 1+2?",
        "completion": f"assistant: {json.dumps([call])}\ntool: 3\nassistant: It is 3.",
        "status": "max_turns", "reason": None, "turns": 2, "tool_calls": 1, "tool_errors": 0, "tokens": 4,
        "versions": ["0.1", "2.1"], "messages": messages, "advantage": 0.0, "spans": [],
    }  # fmt: skip
    assert [(one.tokens, one.truncated, one.staleness) for one in samples([group], 3)] == [(4, True, {3: 3, 1: 1})] * 2


def test_a_step_record_has_the_rewards_of_environments_behind_those_of_functions():
    rewards: list[dict[str, float | None]] = [
        {"Game": 1.0, "rewards:r": 0.5},
        {"rewards:r": 1.5},
        {"Cards": 2.0, "rewards:r": None},
    ]
    rows = [TrajectorySample(1.0, one, tokens=3, truncated=False, staleness={0: 3}) for one in rewards]
    record = step_record(Version(1, 1), rows, {}, functions=["rewards:r"], groups_skipped=0)
    assert list(record["rewards"].items()) == [("rewards:r", 1.0), ("Cards", 2.0), ("Game", 1.0)]


def test_attempt_is_higher_than_any_that_a_generator_serves(tmp_path: Path):
    assert make_run(tmp_path / "a").attempt == 1
    assert make_run(tmp_path / "b", attempts=(6, 2)).attempt == 7


def test_wait_ends_when_the_grace_period_of_a_stop_request_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: None
):
    monkeypatch.setattr("tandem_trainer.run.stopping.STOP_GRACE_S", 0.0)
    run, never = make_run(tmp_path), Future[None]()
    run.stop_on_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        run.wait(never)
    assert never.cancelled()
    assert run.should_stop()


def test_wait_may_finish_within_the_grace_period_of_a_stop_request(tmp_path: Path, signals: None):
    run, soon = make_run(tmp_path), Future[int]()
    run.stop_on_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    soon.set_result(7)
    assert run.wait(soon) == 7


def test_full_disk_loses_no_line_and_the_run_continues(small_volume: Path):
    run = make_run(small_volume)
    folder = small_volume / "default"
    filler = small_volume / "filler"

    def log(step: int) -> None:
        run.make_record(step, GROUPS, {"loss": 0.25})
        with run.timer("publish"):
            run.log()

    log(1)
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(1 << 20))
    for step in range(2, 20):  # the first lines fit into the last block of each file
        log(step)
    with pytest.raises(OSError, match="No space"):
        run.journal.end(Version(19, 1), finished=True)
    filler.unlink()
    log(20)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 21)]
    assert [json.loads(line)["step"] for line in (folder / "rollouts.jsonl").read_text().splitlines()][-1] == 20
    assert ("metrics_failed", 19) not in events(small_volume), "the event does not fit either"


@pytest.mark.parametrize(
    ("last_step", "error", "phase"),
    [(9, None, "finished"), (3, None, "stopped"), (3, OSError("x"), "failed"), (3, KeyboardInterrupt(), "stopped")],
)
def test_the_status_says_how_the_run_ended(tmp_path: Path, last_step: int, error: Any, phase: str):
    run = make_run(tmp_path)

    def live() -> None:
        with run.record_outcome():
            run.make_record(last_step, GROUPS, {"loss": 0.25})
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            live()
    else:
        live()
    status = json.loads((tmp_path / "default" / "status.json").read_text())
    assert (status["phase"], status["step"], status["version"]) == (phase, last_step, f"{last_step}.1")


def test_run_is_finished_once_its_last_step_is_published_and_saved(tmp_path: Path):
    saved: Any = Saved()
    run = make_run(tmp_path)
    run.make_record(9, GROUPS, {"loss": 0.25})
    run.checkpoint(9, saved, saved)
    with pytest.raises(OSError, match="generator"), run.record_outcome():
        raise OSError("the generator is gone")
    assert make_run(tmp_path).finished is None
    with run.record_outcome():
        pass
    with pytest.raises(UserError), make_run(tmp_path).record_outcome():
        raise UserError("this start is refused, which changes nothing about the run")
    assert "step 9 of trainer.max_steps 9" in str(make_run(tmp_path).finished)
    assert make_run(tmp_path, max_steps=10).finished is None
    assert make_run(tmp_path, max_steps=5).finished


def test_changed_settings_are_reported_with_both_values(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    saved: Any = Saved()
    facts = IDENTITY | {"trainer.optim.learning_rate": 1e-6, "trainer.rewards": [{"weight": 1.0}]}
    run = make_run(tmp_path, identity=facts)
    run.make_record(3, GROUPS, {"loss": 0.25})
    run.checkpoint(3, saved, saved)
    again = make_run(tmp_path, identity=facts | {"trainer.optim.learning_rate": 1e-5})
    again.resume(saved, saved)
    assert saved.again == {"sample_again": False, "score_again": False}
    message = "changed since step 3: trainer.optim.learning_rate: 1e-06 → 1e-05"
    assert message in caplog.messages
    (event,) = (event for event in all_events(tmp_path) if event["kind"] == "settings_changed")
    assert event["changes"] == {"trainer.optim.learning_rate": [1e-6, 1e-5]}
    for key, expected in [("trainer.rewards", (False, True)), ("trainer.rollout.temperature", (True, False))]:
        changed = make_run(tmp_path, identity=facts | {key: "other"})
        changed.resume(saved, saved)
        assert (saved.again["sample_again"], saved.again["score_again"]) == expected


def test_failing_record_does_not_advance_the_step(tmp_path: Path):
    """Otherwise the failing run would write a checkpoint of a step that `metrics.jsonl` lacks. The learner is at 3."""
    run, learner = make_run(tmp_path), Saved()
    run.make_record(2, GROUPS, {"loss": 0.25})
    with pytest.raises(TypeError, match="mapping"), run.checkpoint_on_failure(learner, learner):  # type: ignore[arg-type]
        run.make_record(3, GROUPS, None)  # type: ignore[arg-type]
    assert not (tmp_path / "default" / "checkpoints").exists(), "it would be named 2 but hold step 3"


def test_completions_of_skipped_groups_are_written(tmp_path: Path):
    run = make_run(tmp_path, log_completions=2)
    run.make_record(3, GROUPS, {"loss": 0.25})
    run.log()
    run.skip(GROUPS)
    lines = [json.loads(line) for line in (tmp_path / "default" / "rollouts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"], line["row"]) for line in lines][2:] == [(4, True, 3), (4, True, 4)]


def test_phases_of_a_step_add_up_to_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("tandem_trainer.run.clock.time.monotonic", lambda: now[0])
    run = make_run(tmp_path)

    def spend(phase: str, seconds: float) -> None:
        with run.timer(phase):
            now[0] += seconds

    spend("start", 50.0)
    spend("publish", 30.0)
    spend("evaluate", 20.0)
    run.start_step()
    for step in (1, 2):
        spend("wait_for_rollouts", 2.0)
        spend("update", 1.0)
        now[0] += 0.5
        run.make_record(step, GROUPS, {"loss": 0.25})
        spend("publish", 1.5)
        spend("evaluate", 4.0)
        spend("checkpoint", 8.0)
        run.log()
    lines = [json.loads(line) for line in (tmp_path / "default" / "metrics.jsonl").read_text().splitlines()]
    timings = {"wait_for_rollouts_s": 2.0, "update_s": 1.0, "publish_s": 1.5, "evaluate_s": 4.0, "checkpoint_s": 8.0}
    for line in lines:
        assert line["timings"] == timings | {"other_s": 0.5}
        assert line["tokens_per_s"] == 5 / 5.0
