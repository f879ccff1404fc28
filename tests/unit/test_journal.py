"""A run that ends with an error loses nothing that was still in memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.run_folders import make_run
from tandem_trainer.run.events import BURST
from tandem_trainer.run.journal import Journal
from tandem_trainer.run.metrics import JsonLinesWriter
from tandem_trainer.trl.recorder import Recorder, Tally


def fill(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a step while the disk is full, and more events than are written at once."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for step in range(BURST + 2):
        journal.alert("episodes_failed", step, "1 of 8 episodes failed")
    with monkeypatch.context() as patch:
        patch.setattr(JsonLinesWriter, "_write", full)
        journal.step({"step": 3})
        journal.completions([{"step": 3}])


def check(folder: Path) -> None:
    lines: dict[str, list[dict[str, Any]]] = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "rollouts", "events")
    }
    assert [line["step"] for line in lines["metrics"]] == [3]
    assert [line["step"] for line in lines["rollouts"]] == [3]
    failed = [line for line in lines["events"] if line["kind"] == "episodes_failed"]
    assert sum(line.get("repeats", 1) for line in failed) == BURST + 2
    assert any(line["kind"] == "metrics_failed" for line in lines["events"])


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_run_that_breaks_off_writes_what_was_in_memory(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    fill(run.journal, monkeypatch)
    with pytest.raises(type(error)), run.record_outcome():
        raise error
    check(run.dir)


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_script_that_breaks_off_writes_what_was_in_memory(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=1)
    recorder = Recorder(SimpleNamespace(state=state), Tally(), tmp_path)
    recorder.on_train_begin(None, state, None)
    assert recorder._journal
    fill(recorder._journal, monkeypatch)
    recorder.end_with(error)
    check(tmp_path)
