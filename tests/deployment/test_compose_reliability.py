"""The run of docs/reliability.md in small, and the script that starts a run and waits for its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from support.faults import FAULTS
from support.reliability_report import problems, report, timeline
from support.stack import ROOT, stack
from support.unattended import Unattended

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.usefixtures("mock_images")]


@pytest.mark.parametrize(
    "kinds",
    [("generator-process", "restart", "disconnect-trainer"), ("trainer-process", "power", "damaged-weights")],
)
def test_a_run_with_faults_ends_by_itself_and_its_log_tells_the_story(tmp_path: Path, kinds: Sequence[str]) -> None:
    run = Unattended(
        tmp_path, steps=130, seed=0, every_s=4.0, lasts_s=3.0, latency_s=0.2, kinds=kinds, limit=len(kinds)
    )
    run.run()
    assert {happened.kind for happened in run.happened} == {*kinds}
    assert problems(run) == []
    assert len([*timeline(run)]) == len(kinds)
    assert all(FAULTS[kind].title in report(run, [], "--seed 0") for kind in kinds)


@pytest.mark.parametrize("file", ["config.yaml", "prepare.py"])
def test_scripts_up_returns_2_for_a_mistake(project: Path, tmp_path: Path, file: str) -> None:
    """In the trainer, or already in the preflight. The documented unit then does not start the run again."""
    if file == "prepare.py":
        (project / file).write_text("raise SystemExit(2)")
    else:
        config = (project / file).read_text()
        (project / file).write_text(config.replace("odd_rewards:odd", "odd_rewards:absent"))
    with stack(project) as made, (tmp_path / "log").open("wb") as log:
        up = made.run_script(ROOT / "scripts/up", "--no-build", log=log)
        assert up.wait(timeout=120) == 2, (tmp_path / "log").read_text()
