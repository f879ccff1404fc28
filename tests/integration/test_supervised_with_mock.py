"""A supervised trainer: failures are retried, mistakes are not, and the exit status says which it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.projects import Project, assert_same_course

SUPERVISED = {"TANDEM_TRAINER_RETRIES": "1", "TANDEM_TRAINER_END_GENERATORS": "true"}


def test_a_trainer_killed_again_and_again_finishes_the_same_run_and_ends_its_generator(
    make_project: Callable[..., Project],
) -> None:
    undisturbed = make_project("undisturbed")
    assert undisturbed.train().returncode == 0
    killed = make_project("killed")
    # Every process dies at its fifth reward call, in its third step. Until then it has written a checkpoint.
    ended = killed.train(ACTION="SIGKILL", AT_CALL="5", **SUPERVISED)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("ended with exit status 137; starting it again") == 2
    assert_same_course(killed, undisturbed)
    assert killed.generator.process.wait(30) == 0
    assert undisturbed.generator.process.poll() is None


def test_a_mistake_is_not_retried_and_ends_the_generator(make_project: Callable[..., Project]) -> None:
    project = make_project(rewards=[{"function": "absent:reward"}])
    ended = project.train(**SUPERVISED)
    assert ended.returncode == 2
    assert ended.stderr.count("error: ") == 1
    assert project.generator.process.wait(30) == 0


def test_a_wrong_configuration_is_one_message(make_project: Callable[..., Project]) -> None:
    ended = make_project().train("--trainer.max_stepss=5", **SUPERVISED)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_one_of_several_processes_has_the_status_2(
    make_project: Callable[..., Project], rank: int
) -> None:
    project = make_project(max_steps=3)
    ended = project.train(ranks=2, ACTION="raise", AT_CALL="2", AT_RANK=str(rank))
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "KeyError" in ended.stderr


def test_a_stop_signal_is_passed_on_and_its_status_comes_back(make_project: Callable[..., Project]) -> None:
    project = make_project()
    # The trainer stops itself, as if the container's stop signal had reached it alone.
    ended: Any = project.train(ACTION="SIGTERM", AT_CALL="3", TANDEM_TRAINER_RETRIES="0")
    assert ended.returncode == 143
    assert "stopped at step 2 with a checkpoint. The same command resumes the run." in ended.stdout
