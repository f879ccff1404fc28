"""What a run leaves behind that was cut short: nothing is lost, and nothing is said that is not so."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from support.run_folders import GROUPS, Saved, make_run


def _records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "default" / name).read_text().splitlines()]


def test_a_run_stopped_before_its_last_version_was_published_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: None
):
    monkeypatch.setattr("tandem_trainer.run.STOP_GRACE_S", 0.0)
    saved: Any = Saved()
    run = make_run(tmp_path)
    run.stop_on_signals()
    with run.life():
        with run.kept(saved, saved):
            run.measure(9, GROUPS, {"loss": 0.25})
            os.kill(os.getpid(), signal.SIGTERM)
            run.wait(Future[None]())  # a publish that no generator answers
        run.last_checkpoint(9, saved, saved)
    assert json.loads((tmp_path / "default" / "status.json").read_text())["phase"] == "stopped"
    assert not run.is_done
    again = make_run(tmp_path)
    assert again.finished is None
    again.resume(saved, saved)
    assert [line["step"] for line in _records(tmp_path)] == [9]
