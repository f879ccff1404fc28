"""A second checkpoint of the same step has the rollouts of that moment, and the learner's files of the first one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.ranks import run_ranks
from support.run_folders import GROUPS, Saved, events, make_run
from tandem_protocol.folders import fsync
from tandem_trainer.learner.mismatch import MismatchTooHigh
from tandem_trainer.run import checkpoint as checkpoint_module
from tandem_trainer.run.run import Run

STEP = 3


class Queue(Saved):
    """Has finished groups, and counts how often the learner was saved."""

    def __init__(self, *groups: str) -> None:
        self.groups = [*groups]
        self.learner_saves = 0

    def save(self, directory: Path) -> None:
        self.learner_saves += 1
        super().save(directory)

    def state_dict(self) -> dict[str, Any]:
        return {"groups": self.groups}

    def load_state_dict(self, state: dict[str, Any], **again: bool) -> None:
        self.groups = state["groups"]

    def forget_samples(self) -> None:
        self.groups = []


def written(folder: Path, queue: Any) -> Run:
    """A run that has a checkpoint of STEP."""
    run = make_run(folder)
    run.make_record(STEP, GROUPS, {"loss": 0.25})
    assert run.checkpoint(STEP, queue, queue)
    return run


def resumed(folder: Path) -> list[str]:
    """The groups with which the run in `folder` resumes."""
    queue: Any = Queue()
    assert make_run(folder).resume(queue, queue) == STEP
    assert queue.loaded
    return [*queue.groups]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "default" / "checkpoints" / f"{STEP:06d}").iterdir())


def test_groups_that_finish_after_the_first_checkpoint_are_in_the_second(tmp_path: Path) -> None:
    queue: Any = Queue("first")
    run = written(tmp_path, queue)
    for count in (1, 2):
        queue.groups.append(f"later {count}")
        run.last_checkpoint(STEP, queue, queue)
        assert resumed(tmp_path) == queue.groups
    assert files(tmp_path) == ["rollouts-0.2.json", "saved", "state.json"], "only the files in use stay"
    assert queue.learner_saves == 1


def test_a_resumed_run_replaces_the_rollouts_of_its_checkpoint(tmp_path: Path) -> None:
    queue: Any = Queue("first")
    run = written(tmp_path, queue)
    run.last_checkpoint(STEP, queue, queue)
    again = make_run(tmp_path)
    again.resume(queue, queue)
    queue.groups.append("of the second start")
    again.last_checkpoint(STEP, queue, queue)
    assert resumed(tmp_path) == ["first", "of the second start"]
    state = json.loads((tmp_path / "default" / "checkpoints" / f"{STEP:06d}" / "state.json").read_text())
    assert state["attempt"] == again.attempt


def test_samples_with_wrong_probabilities_do_not_stay_in_an_earlier_checkpoint_of_the_step(tmp_path: Path) -> None:
    queue: Any = Queue("wrong")
    run = written(tmp_path, queue)
    with pytest.raises(MismatchTooHigh), run.checkpoint_on_failure(queue, queue):
        raise MismatchTooHigh("x")
    assert resumed(tmp_path) == []


def test_a_kill_at_any_moment_of_the_second_write_leaves_the_old_or_the_new_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for calls in range(20):
        folder = tmp_path / str(calls)
        queue: Any = Queue("first")
        run = written(folder, queue)
        queue.groups.append("later")
        with monkeypatch.context() as patched:
            left = Countdown(calls)
            for name in ("write_text", "rename", "unlink"):
                patched.setattr(Path, name, left.before(getattr(Path, name)))
            patched.setattr(checkpoint_module, "fsync", left.before(fsync))
            try:
                run.checkpoint(STEP, queue, queue)
            except Killed:
                found.append(resumed(folder))
                continue
        assert resumed(folder) == ["first", "later"]
        break
    assert {*map(tuple, found)} == {("first",), ("first", "later")}
    assert found == sorted(found)
    assert len(found) >= 6, "each call was a moment"


class Killed(BaseException):
    """The process has ended."""


class Countdown:
    """Raises `error` in place of a call, after `calls` others. Of a text, half is written before."""

    def __init__(self, calls: int, error: type[BaseException] = Killed) -> None:
        self.left = calls
        self.error = error

    def before(self, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if not self.left:
                if function.__name__ == "write_text":
                    file, text = arguments
                    function(file, text[: len(text) // 2])
                raise self.error
            self.left -= 1
            return function(*arguments, **options)

        return call


def test_a_second_write_that_fails_keeps_the_checkpoint_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue: Any = Queue("first")
    run = written(tmp_path, queue)
    queue.groups.append("later")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module, "fsync", Countdown(0, OSError).before(None))
        run.last_checkpoint(STEP, queue, queue)  # does not wait: the step has a checkpoint
    assert resumed(tmp_path) == ["first"]
    assert events(tmp_path) == [("checkpoint_failed", STEP)]
    assert run.checkpoint_due(STEP + 1), "the next step tries again"
    run.last_checkpoint(STEP, queue, queue)
    assert resumed(tmp_path) == ["first", "later"]
    assert files(tmp_path) == ["rollouts-0.2.json", "saved", "state.json"]


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_second_write_that_does_not_fit_leaves_the_space_to_the_alert(small_volume: Path, rewritten: bool) -> None:
    queue: Any = Queue("first")
    run = written(small_volume, queue)
    if rewritten:
        assert run.checkpoint(STEP, queue, queue)
    before = files(small_volume)
    assert before == [f"rollouts-0{'.1' if rewritten else ''}.json", "saved", "state.json"]
    queue.groups.append("x" * (1 << 20))
    assert run.checkpoint(STEP, queue, queue), "the step has a checkpoint"
    assert files(small_volume) == before
    assert events(small_volume) == [("checkpoint_failed", STEP)]
    assert resumed(small_volume) == ["first"]


def test_a_state_that_does_not_fit_is_deleted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue: Any = Queue("first")
    run = written(tmp_path, queue)
    before = files(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", Countdown(1, OSError).before(Path.write_text))
        run.checkpoint(STEP, queue, queue)
    assert files(tmp_path) == before
    assert resumed(tmp_path) == ["first"]


def test_a_second_write_that_fails_after_its_rename_keeps_the_new_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue: Any = Queue("first")
    run = written(tmp_path, queue)
    queue.groups.append("later")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module, "fsync", Countdown(2, OSError).before(fsync))
        run.checkpoint(STEP, queue, queue)
    assert events(tmp_path) == [("checkpoint_failed", STEP)]
    assert files(tmp_path) == ["rollouts-0.1.json", "saved", "state.json"]
    assert resumed(tmp_path) == ["first", "later"]


def _write_twice(folder: Path) -> None:
    queue: Any = Queue("first")
    run = written(folder, queue)
    queue.groups.append("later")
    run.last_checkpoint(STEP, queue, queue)
    assert resumed(folder) == ["first", "later"]


def test_two_ranks_replace_their_rollouts_together(tmp_path: Path) -> None:
    run_ranks(2, _write_twice, tmp_path)
    assert files(tmp_path) == ["rollouts-0.1.json", "rollouts-1.1.json", "saved", "state.json"]
