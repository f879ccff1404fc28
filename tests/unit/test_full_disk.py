"""A full disk is an alert and not the end of a run. No line is lost or doubled."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from support.run_folders import GROUPS, Saved, Unsaved, events, make_run
from tandem_protocol.lock import exclusive
from tandem_trainer import volumes
from tandem_trainer.ranks import PartFailed, do_together
from tandem_trainer.run import checkpoint
from tandem_trainer.run.checkpoint import CheckpointFailed
from tandem_trainer.run.metrics import JsonLinesWriter
from tandem_trainer.run.run import Run

Fill = Callable[[], Path]


@pytest.fixture
def fill(small_volume: Path) -> Fill:
    """Fill the volume, and return the file to delete."""

    def write() -> Path:
        filler = small_volume / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(1 << 20))
        return filler

    return write


def lines(folder: Path, name: str) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "default" / name).read_text().splitlines()]


def steps(run: Run, first: int, last: int) -> None:
    """Make steps with an evaluation each."""
    for step in range(first, last + 1):
        run.make_record(step, GROUPS, {"loss": 0.25})
        run.journal.evaluation({"step": step, "padding": "x" * 1000})
        run.log()


def test_a_checkpoint_has_the_lines_of_all_steps_before_it_on_disk(small_volume: Path, fill: Fill) -> None:
    saved: Any = Saved()
    run = make_run(small_volume)
    steps(run, 1, 1)
    filler = fill()
    steps(run, 2, 8)
    assert not run.checkpoint(8, saved, saved), "the lines do not fit"
    filler.unlink()
    run.make_record(9, GROUPS, {"loss": 0.25})
    run.journal.evaluation({"step": 9})
    assert run.checkpoint(9, saved, saved)  # and now the process is killed
    again = make_run(small_volume)
    assert again.resume(saved, saved) == 9
    assert lines(small_volume, "metrics.jsonl") == [*range(1, 10)]
    assert lines(small_volume, "eval.jsonl") == [*range(1, 10)]
    assert sorted({*lines(small_volume, "rollouts.jsonl")}) == [*range(1, 10)]
    assert len(lines(small_volume, "rollouts.jsonl")) == 9 * len(lines(small_volume, "rollouts.jsonl")[:1]) * 4
    assert {kind for kind, _ in events(small_volume)} >= {"metrics_failed", "eval_failed", "checkpoint_failed"}


def test_an_evaluation_that_is_repeated_is_written_once(small_volume: Path, fill: Fill) -> None:
    run = make_run(small_volume)
    filler = fill()
    for value in (1, 2):
        run.journal.evaluation({"step": 3, "value": value, "padding": "x" * 5000})
    filler.unlink()
    run.journal.flush()
    (line,) = (small_volume / "default" / "eval.jsonl").read_text().splitlines()
    assert json.loads(line)["value"] == 2


def test_a_resumed_run_drops_later_lines_on_a_full_disk(small_volume: Path, fill: Fill) -> None:
    file = JsonLinesWriter(small_volume / "metrics.jsonl")
    file.append({"step": step, "padding": "x" * 5000} for step in range(1, 6))
    fill()
    file.forget_after(2)
    assert file.last_step() == 2


def test_a_lock_is_held_on_a_full_disk(small_volume: Path, fill: Fill) -> None:
    fill()
    with exclusive(small_volume / "LOCK", "x" * 5000):
        pass


def test_the_last_checkpoint_waits_for_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    learner: Any = Unsaved()
    learner.error = OSError(28, "No space left on device")
    pauses: list[float] = []

    def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 2:
            learner.error = None

    monkeypatch.setattr("tandem_trainer.run.run.time.sleep", sleep)
    run.make_record(9, GROUPS, {"loss": 0.25})
    run.last_checkpoint(9, learner, learner)
    assert pauses == [volumes.DISK_PAUSE_S] * 2
    assert [path.name for path in (tmp_path / "default" / "checkpoints").iterdir()] == ["000009"]
    assert events(tmp_path) == [("checkpoint_failed", 9)] * 2


@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_a_checkpoint_that_fails_after_its_rename_is_completed_by_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = make_run(tmp_path, checkpoint={"keep": 1})
    saved: Any = Saved()
    run.make_record(8, GROUPS, {"loss": 0.25})
    assert run.checkpoint(8, saved, saved)
    run.make_record(9, GROUPS, {"loss": 0.25})
    failed: list[Path] = []

    owner: Any = checkpoint if name == "fsync" else Path
    function = getattr(owner, name)

    def once(path: Path, *arguments: Any) -> Any:
        if path.name == ("checkpoints" if name == "fsync" else "000008") and not failed:
            failed.append(path)
            raise OSError(28, "No space left on device")
        return function(path, *arguments)

    monkeypatch.setattr(owner, name, once)
    monkeypatch.setattr("tandem_trainer.run.run.time.sleep", lambda _: None)
    run.last_checkpoint(9, saved, saved)
    assert failed
    assert [path.name for path in (tmp_path / "default" / "checkpoints").iterdir()] == ["000009"]
    again = make_run(tmp_path)
    assert again.resume(saved, saved) == 9
    assert saved.loaded


@pytest.mark.parametrize("reason", ["deadline", "stop"])
def test_the_wait_for_space_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    run = make_run(tmp_path)
    learner: Any = Unsaved()
    learner.error = OSError(28, "No space left on device")
    if reason == "stop":
        run._stop.signal = 15
    else:
        monkeypatch.setattr("tandem_trainer.run.run.DISK_TIMEOUT_S", -1.0)
    run.make_record(9, GROUPS, {"loss": 0.25})
    with pytest.raises(CheckpointFailed):
        run.last_checkpoint(9, learner, learner)


def test_the_alert_of_a_failed_checkpoint_is_one_line_with_what_is_needed_and_free(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    learner: Any = Unsaved()
    learner.checkpoint_bytes = 5_000_000_000_000_000
    learner.error = OSError(28, "No space left on device\n" * 528)
    run.make_record(2, GROUPS, {"loss": 0.25})
    run.checkpoint(2, learner, learner)
    (event,) = map(json.loads, (tmp_path / "default" / "events.jsonl").read_text().splitlines())
    message = event["message"]
    assert "It needs about 5000000.00 GB, and" in message
    free_gb = shutil.disk_usage(tmp_path).free / 1e9
    found_gb = float(message.partition("default has ")[2].partition(" GB free")[0])
    assert found_gb == pytest.approx(free_gb, rel=0.1)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [(OSError(28, "full"), True), (OSError(13, "denied"), False), (ValueError("x"), False)],
)
def test_a_failed_part_says_whether_another_try_may_succeed(error: Exception, may_pass: bool) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(PartFailed) as caught:
        do_together(Accelerator(cpu=True), fail)
    assert caught.value.may_pass == may_pass


@pytest.mark.parametrize("resumes", [True, False])
def test_a_run_with_a_checkpoint_waits_until_its_folder_has_space(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resumes: bool
) -> None:
    tries: list[Path] = []

    def full_at_first(folder: Path, key: str) -> None:
        tries.append(folder)
        if len(tries) < 3:
            raise OSError(f"{key}: no space")

    monkeypatch.setattr(volumes, "require_writable", full_at_first)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    if resumes:
        volumes.wait_until_writable(tmp_path, "trainer.output_dir", resumes=True)
    else:
        with pytest.raises(OSError, match=r"trainer\.output_dir: no space"):
            volumes.wait_until_writable(tmp_path, "trainer.output_dir", resumes=False)
    assert len(tries) == (3 if resumes else 1)


def test_the_fix_for_a_small_weights_volume_is_a_command_with_the_size() -> None:
    fix = volumes.how_to_enlarge(100 << 20, 2, {"TANDEM_WEIGHTS_VOLUME": "mine_weights"})
    assert "docker compose down && docker volume rm mine_weights" in fix
    assert "TANDEM_WEIGHTS_SIZE=400m" in fix
    assert "docker" not in volumes.how_to_enlarge(100 << 20, 2, {})


@pytest.mark.parametrize(("size", "warns"), [("64k", False), ("1m", True), ("50%", False)])
def test_a_weights_volume_of_another_size_than_asked_for_is_reported(
    small_volume: Path, caplog: pytest.LogCaptureFixture, size: str, warns: bool
) -> None:
    volumes.check_size(small_volume, {"TANDEM_WEIGHTS_VOLUME": "w", "TANDEM_WEIGHTS_SIZE": size})
    assert ("TANDEM_WEIGHTS_SIZE=1m" in caplog.text) == warns
