"""`tandem demo` with the real trainer and the mock engine."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from support.demo import Demo, make_tiny_project, running_demo

REAL_SERVICES = {"PYTHONPATH": ""}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_tiny_project(tmp_path)


def recorded_steps(demo: Demo) -> list[int]:
    return [json.loads(line)["step"] for line in (demo.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_real_trainer_completes_a_run_with_the_mock(project: Path) -> None:
    with running_demo(project, **REAL_SERVICES) as demo:
        output = demo.finish()
        assert demo.process.returncode == 0, demo.errors
        assert recorded_steps(demo) == [1, 2, 3]
        assert "eval after step 3: " in output
        assert (demo.run_dir / "reward.png").exists()
        demo.wait_until_nothing_is_left()


def test_an_interrupted_run_resumes_from_its_checkpoint(project: Path) -> None:
    with running_demo(project, "--trainer.max_steps=100000", **REAL_SERVICES) as demo:
        demo.wait_for_line("step 2/")
        demo.process.send_signal(signal.SIGINT)
        demo.finish()
        assert demo.process.returncode == 130, demo.errors
        stopped_at = recorded_steps(demo)[-1]
    with running_demo(project, "--resume", f"--trainer.max_steps={stopped_at + 2}", **REAL_SERVICES) as demo:
        demo.finish()
        assert demo.process.returncode == 0, demo.errors
        assert recorded_steps(demo) == list(range(1, stopped_at + 3))
        demo.wait_until_nothing_is_left()


def test_an_error_in_the_trainers_section_is_reported_by_the_trainer(project: Path) -> None:
    with running_demo(project, "--trainer.max_stepz=5", **REAL_SERVICES) as demo:
        demo.finish()
        assert demo.process.returncode == 2
        assert "did you mean 'trainer.max_steps'?" in demo.errors
        demo.wait_until_nothing_is_left()
