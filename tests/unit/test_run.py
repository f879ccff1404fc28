"""A run's files: whole at any time, one line a step however often it is resumed."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from support.run_folders import GROUPS, IDENTITY, Saved, Unsaved, make_run
from tandem_protocol.version import Version
from tandem_trainer.checkpoint import Checkpoints
from tandem_trainer.errors import UserError
from tandem_trainer.metrics import JsonLinesWriter, completion_records, samples, step_record
from tandem_trainer.run import CheckpointFailed, Run
from tandem_trainer.stopping import Stopped


def test_lines_of_steps_to_come_and_a_torn_line_are_forgotten(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    file = JsonLinesWriter(path)
    file.forget_after(2)
    assert file.last_step() == 2
    file.append([{"step": 3}])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_checkpoint_appears_whole_and_old_ones_go(tmp_path: Path):
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


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        checkpoints.begin(step)
        checkpoints.commit(step, best=min(step, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002", "000003"]


def test_what_a_killed_process_left_in_staging_is_no_checkpoint(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.begin(5)
    (checkpoints.staging(5) / "half").write_text("x")
    assert checkpoints.latest() is None
    checkpoints.begin(5)
    assert list(checkpoints.staging(5).iterdir()) == []


def test_a_step_record_holds_the_steps_values():
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
        "completion_tokens_mean": 1.25,
        "truncated_fraction": 0.25,
        "rollout_tokens": 5,
        "groups_skipped": 1,
    }


def test_the_sample_of_completions_takes_one_of_each_group_first():
    records = completion_records(Version(3, 1), GROUPS, 3)
    assert [(r["row"], r["completion"], r["reward"]) for r in records] == [
        (3, "text 0", 1.0),
        (4, "text 0", None),
        (3, "text 1", 0.5),
    ]
    assert records[2]["finish_reason"] == "length"
    assert records[0]["versions"] == ["2.1"]


def _fail_after_step_3(run: Run, error: Exception) -> None:
    learner = Saved()
    run.resume(learner, learner)  # type: ignore[arg-type]  # all that it uses of both
    with run.kept(learner, learner):  # type: ignore[arg-type]
        run.measure(3, GROUPS, {"loss": 0.25})
        raise error


def test_a_run_that_fails_goes_on_from_its_last_whole_step(tmp_path: Path):
    with pytest.raises(OSError, match="the volume is gone"):
        _fail_after_step_3(make_run(tmp_path), OSError("the volume is gone"))
    again, learner = make_run(tmp_path), Saved()
    assert again.resume(learner, learner) == 3  # type: ignore[arg-type]
    assert learner.loaded
    (line,) = (tmp_path / "default" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 3
    assert json.loads(line)["timings"]["publish_s"] == 0.0


def test_a_run_that_fails_between_two_optimizer_steps_of_a_batch_writes_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Saved, "completed_updates", None)
    with pytest.raises(OSError, match="no"):
        _fail_after_step_3(make_run(tmp_path), OSError("no"))
    assert not (tmp_path / "default" / "checkpoints").exists()


def test_a_run_that_fails_before_its_first_step_leaves_no_checkpoint(tmp_path: Path):
    run, learner = make_run(tmp_path), Saved()
    with pytest.raises(OSError, match="no"), run.kept(learner, learner):  # type: ignore[arg-type]
        raise OSError("no")
    assert not (tmp_path / "default" / "checkpoints").exists()


def test_a_checkpoint_of_something_else_is_refused_with_both_values(tmp_path: Path):
    with pytest.raises(OSError, match="x"):
        _fail_after_step_3(make_run(tmp_path), OSError("x"))
    with pytest.raises(
        UserError, match=r'shared.model: "m" → "other", but the checkpoint holds.*another trainer.run_name'
    ):
        make_run(tmp_path, identity=IDENTITY | {"shared.model": "other"})


def test_a_checkpoint_is_due_where_an_evaluation_is_the_best_and_a_resumed_run_remembers_which(tmp_path: Path):
    saved: Any = Saved()  # stands for the learner and the rollouts

    def run() -> Run:
        return make_run(
            tmp_path,
            checkpoint={"keep_best": True, "every_steps": 5, "keep": 1},
            eval={"prompts": {"source": "held_out.jsonl"}, "every_steps": 1},
        )

    def step(run: Run, number: int, reward: float | None) -> bool:
        run.measure(number, GROUPS, {"loss": 0.25})
        run.evaluated({"reward_mean": reward})
        if due := run.checkpoint_due(number):
            run.checkpoint(number, saved, saved)
        return due

    first = run()
    first.evaluated({"reward_mean": 9.0})  # of the policy that training starts from: no checkpoint holds it
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


def test_an_attempt_is_newer_than_any_that_a_generator_serves(tmp_path: Path):
    assert make_run(tmp_path / "a").attempt == 1
    assert make_run(tmp_path / "b", attempts=(6, 2)).attempt == 7


def test_a_wait_ends_when_the_grace_of_a_stop_request_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: None
):
    monkeypatch.setattr("tandem_trainer.stopping.STOP_GRACE_S", 0.0)
    run, never = make_run(tmp_path), Future[None]()
    run.stop_on_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        run.wait(never)
    assert never.cancelled()
    assert run.should_stop()


def test_a_stop_request_lets_a_wait_finish_within_its_grace(tmp_path: Path, signals: None):
    run, soon = make_run(tmp_path), Future[int]()
    run.stop_on_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    soon.set_result(7)
    assert run.wait(soon) == 7


def test_a_checkpoint_that_cannot_be_read_is_told_with_its_path(tmp_path: Path):
    with pytest.raises(OSError, match="x"):
        _fail_after_step_3(make_run(tmp_path), OSError("x"))
    (tmp_path / "default" / "checkpoints" / "000003" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"000003 cannot be read.*delete the checkpoint"):
        make_run(tmp_path)


def test_somebodys_copy_of_a_checkpoint_is_none(tmp_path: Path):
    (tmp_path / "000020.bak").mkdir()
    assert Checkpoints(tmp_path, keep=1).latest() is None


def _events(folder: Path) -> list[tuple[str, int]]:
    file = folder / "default" / "events.jsonl"
    return [(event["kind"], event["step"]) for event in map(json.loads, file.read_text().splitlines())]


def test_a_checkpoint_that_fails_is_an_alert_and_is_tried_again_at_the_next_step(tmp_path: Path):
    run, learner = make_run(tmp_path, checkpoint={"every_steps": 2}), Unsaved()
    checkpoints = tmp_path / "default" / "checkpoints"
    due = []
    for step in (1, 2, 3, 4, 5):
        learner.error = Unsaved.error if step < 4 else None
        run.measure(step, GROUPS, {"loss": 0.25})
        due.append(run.checkpoint_due(step))
        if due[-1]:
            run.checkpoint(step, learner, learner)  # type: ignore[arg-type]
        run.log(GROUPS)
        assert step >= 4 or not checkpoints.exists() or list(checkpoints.iterdir()) == []
    assert due == [False, True, True, True, False]
    assert _events(tmp_path) == [("checkpoint_failed", 2), ("checkpoint_failed", 3)]
    assert [path.name for path in checkpoints.iterdir()] == ["000004"]
    lines = [json.loads(line) for line in (tmp_path / "default" / "metrics.jsonl").read_text().splitlines()]
    assert [line["checkpoint_failures"] for line in lines] == [0, 1, 2, 0, 0]


def test_a_run_whose_last_checkpoint_fails_does_not_end_well(tmp_path: Path):
    run, learner = make_run(tmp_path), Unsaved()
    run.measure(9, GROUPS, {"loss": 0.25})
    with pytest.raises(CheckpointFailed, match="of step 9, cannot be written"), run.life():
        run.last_checkpoint(9, learner, learner)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "default" / "status.json").read_text())["phase"] == "failed"


def test_a_full_disk_costs_no_line_and_the_run_goes_on(small_volume: Path):
    run = make_run(small_volume)
    folder, filler = small_volume / "default", small_volume / "filler"

    def log(step: int) -> None:
        run.measure(step, GROUPS, {"loss": 0.25})
        with run.timer("publish"):
            run.log(GROUPS)

    log(1)
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(1 << 20))
    for step in range(2, 20):  # the last block of each file has some room
        log(step)
    with pytest.raises(OSError, match="No space"):
        run.journal.end(Version(19, 1), finished=True)
    filler.unlink()
    log(20)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 21)]
    assert [json.loads(line)["step"] for line in (folder / "rollouts.jsonl").read_text().splitlines()][-1] == 20
    assert ("metrics_failed", 19) not in _events(small_volume), "there is no room for it either"


@pytest.mark.parametrize(
    ("last_step", "error", "phase"),
    [(9, None, "finished"), (3, None, "stopped"), (3, OSError("x"), "failed"), (3, KeyboardInterrupt(), "stopped")],
)
def test_the_status_says_how_the_run_ended(tmp_path: Path, last_step: int, error: Any, phase: str):
    run = make_run(tmp_path)

    def live() -> None:
        with run.life():
            run.measure(last_step, GROUPS, {"loss": 0.25})
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            live()
    else:
        live()
    status = json.loads((tmp_path / "default" / "status.json").read_text())
    assert (status["phase"], status["step"], status["version"]) == (phase, last_step, f"{last_step}.1")


def test_a_finished_run_is_one_whose_last_step_was_published_and_saved(tmp_path: Path):
    saved: Any = Saved()
    run = make_run(tmp_path)
    run.measure(9, GROUPS, {"loss": 0.25})
    run.checkpoint(9, saved, saved)
    with pytest.raises(OSError, match="generator"), run.life():
        raise OSError("the generator is gone")
    assert make_run(tmp_path).finished is None
    with run.life():
        pass
    with pytest.raises(UserError), make_run(tmp_path).life():
        raise UserError("this start is refused, which changes nothing about the run")
    assert "step 9 of trainer.max_steps 9" in str(make_run(tmp_path).finished)
    assert make_run(tmp_path, max_steps=10).finished is None
    assert make_run(tmp_path, max_steps=5).finished


def test_changed_settings_are_said_and_kept_with_both_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved: Any = Saved()
    facts = IDENTITY | {"trainer.optim.learning_rate": 1e-6, "trainer.rewards": [{"weight": 1.0}]}
    run = make_run(tmp_path, identity=facts)
    run.measure(3, GROUPS, {"loss": 0.25})
    run.checkpoint(3, saved, saved)
    again = make_run(tmp_path, identity=facts | {"trainer.optim.learning_rate": 1e-5})
    again.resume(saved, saved)
    assert saved.again == {"sample_again": False, "score_again": False}
    message = "resumed from step 3; changed since: trainer.optim.learning_rate: 1e-06 → 1e-05"
    assert capsys.readouterr().out == f"{message}\n"
    (event,) = (tmp_path / "default" / "events.jsonl").read_text().splitlines()
    assert json.loads(event)["changes"] == {"trainer.optim.learning_rate": [1e-6, 1e-5]}
    for key, expected in [("trainer.rewards", (False, True)), ("trainer.rollout.temperature", (True, False))]:
        changed = make_run(tmp_path, identity=facts | {key: "other"})
        changed.resume(saved, saved)
        assert (saved.again["sample_again"], saved.again["score_again"]) == expected


def test_a_best_evaluation_by_other_rewards_no_longer_compares_but_its_checkpoint_stays(tmp_path: Path):
    saved: Any = Saved()
    options: dict[str, Any] = {
        "checkpoint": {"keep_best": True, "every_steps": 2, "keep": 1},
        "eval": {"prompts": {"source": "held_out.jsonl"}, "every_steps": 1},
    }

    def step(run: Run, number: int, reward: float) -> None:
        run.measure(number, GROUPS, {"loss": 0.25})
        run.evaluated({"reward_mean": reward})
        run.checkpoint(number, saved, saved)

    run = make_run(tmp_path, **options)
    step(run, 1, 0.9)
    step(run, 2, 0.1)
    again = make_run(tmp_path, identity=IDENTITY | {"trainer.rewards": "other"}, **options)
    again.resume(saved, saved)
    again.measure(3, GROUPS, {"loss": 0.25})
    again.checkpoint(3, saved, saved)
    names = [path.name for path in (tmp_path / "default" / "checkpoints").iterdir()]
    assert sorted(names) == ["000001", "000003"]
    step(again, 4, 0.2)
    assert [path.name for path in (tmp_path / "default" / "checkpoints").iterdir()] == ["000004"]


def test_a_record_that_cannot_be_made_leaves_the_step_as_it_was(tmp_path: Path):
    """Or the checkpoint of a failing run would be of a step that `metrics.jsonl` lacks. The learner is at step 3."""
    run, learner = make_run(tmp_path), Saved()
    run.measure(2, GROUPS, {"loss": 0.25})
    other = [
        group.model_copy(update={"rewards_by_function": {"a:b": (1.0, 0.0), "c:d": (1.0, 0.0)}}) for group in GROUPS
    ]
    with pytest.raises(ValueError, match="zip"), run.kept(learner, learner):  # type: ignore[arg-type]
        run.measure(3, other, {"loss": 0.25})
    assert not (tmp_path / "default" / "checkpoints").exists(), "step 2's would hold the parameters of step 3"


def test_skipped_groups_are_written_so_that_they_can_be_read(tmp_path: Path):
    run = make_run(tmp_path, log_completions=2)
    run.measure(3, GROUPS, {"loss": 0.25})
    run.skip(GROUPS)
    lines = [json.loads(line) for line in (tmp_path / "default" / "rollouts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"], line["row"]) for line in lines] == [(4, True, 3), (4, True, 4)]


def test_the_phases_of_a_step_add_up_and_none_is_of_another_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("tandem_trainer.clock.time.monotonic", lambda: now[0])
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
        run.measure(step, GROUPS, {"loss": 0.25})
        spend("publish", 1.5)
        spend("evaluate", 4.0)
        spend("checkpoint", 8.0)
        run.log(GROUPS)
    lines = [json.loads(line) for line in (tmp_path / "default" / "metrics.jsonl").read_text().splitlines()]
    timings = {"wait_for_rollouts_s": 2.0, "update_s": 1.0, "publish_s": 1.5, "evaluate_s": 4.0, "checkpoint_s": 8.0}
    for line in lines:
        assert line["timings"] == timings | {"other_s": 0.5}
        assert line["tokens_per_s"] == 5 / 5.0
