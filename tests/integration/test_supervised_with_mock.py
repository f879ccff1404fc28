"""A supervised trainer: failures are retried, mistakes are not, and the exit status says which it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.projects import Project, assert_same_course
from tandem_protocol.lock import exclusive

ONCE: dict[str, Any] = {"TANDEM_TRAINER_RETRIES": "1"}


@pytest.fixture
def end_file(tmp_path: Path) -> Path:
    return tmp_path / "run-over"


def test_a_trainer_killed_again_and_again_finishes_the_same_run_and_ends_its_generator(
    make_project: Callable[..., Project], end_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = make_project("undisturbed")
    assert undisturbed.train().returncode == 0
    monkeypatch.setenv("TANDEM_END_FILE", str(end_file))
    killed = make_project("killed")
    # Every process dies at its fifth reward call, in its third step. Until then it has written a checkpoint.
    ended = killed.train(ACTION="SIGKILL", AT_CALL="5", TANDEM_TRAINER_END_FILE=str(end_file), **ONCE)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("ended with exit status 137; starting it again") == 2
    assert_same_course(killed, undisturbed)
    assert killed.generator.process.wait(30) == 0
    assert undisturbed.generator.process.poll() is None


def test_a_mistake_is_not_retried_and_is_the_end(make_project: Callable[..., Project], end_file: Path) -> None:
    project = make_project(rewards=[{"function": "absent:reward"}])
    ended = project.train(TANDEM_TRAINER_END_FILE=str(end_file), **ONCE)
    assert ended.returncode == 2
    assert ended.stderr.count(" ERROR ") == 1
    assert end_file.exists()


def test_a_wrong_configuration_is_one_message(make_project: Callable[..., Project]) -> None:
    ended = make_project().train("--trainer.max_stepss=5", **ONCE)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1


def test_a_second_trainer_does_not_end_the_generators_of_the_first(
    make_project: Callable[..., Project], end_file: Path
) -> None:
    project = make_project()
    with exclusive(project.run_dir / "LOCK", "the first trainer"):
        ended = project.train(TANDEM_TRAINER_END_FILE=str(end_file), **ONCE)
    assert ended.returncode == 2
    assert "is in use by the first trainer" in ended.stderr
    assert not end_file.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_one_of_several_processes_has_the_status_2(
    make_project: Callable[..., Project], rank: int
) -> None:
    project = make_project(max_steps=3)
    ended = project.train(ranks=2, ACTION="raise", AT_CALL="2", AT_RANK=str(rank))
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "KeyError" in ended.stderr


def test_a_trainer_that_was_stopped_is_not_started_again(make_project: Callable[..., Project], end_file: Path) -> None:
    project = make_project()
    ended = project.train(ACTION="SIGTERM", AT_CALL="3", TANDEM_TRAINER_END_FILE=str(end_file), **ONCE)
    assert ended.returncode == 143
    assert "stopped at step 2 with a checkpoint. The same command resumes the run." in ended.stdout
    assert "starting it again" not in ended.stderr
    assert not end_file.exists(), "the run is not over"
