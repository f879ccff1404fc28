"""A trainer that is stopped before it trains."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.forked import start_trainer
from support.ports import free_port
from support.projects import Project

DEADLINE_S = 60.0


def test_a_trainer_stopped_while_it_waits_for_generators_has_the_status_stopped(tmp_path: Path, model: Path):
    absent_generator: Any = SimpleNamespace(port=free_port())
    project = Project(tmp_path / "project", model, absent_generator, tmp_path / "weights")
    log = tmp_path / "log"
    trainer = start_trainer(project.directory / "config.yaml", log)
    status = project.run_dir / "status.json"
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not status.exists() or json.loads(status.read_text())["phase"] != "wait_for_generators":
            assert trainer.is_alive(), log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        trainer.terminate()
        trainer.join(DEADLINE_S)
    finally:
        trainer.kill()
    assert (trainer.exitcode, json.loads(status.read_text())["phase"]) == (143, "stopped")
    assert "Traceback" not in log.read_text()
