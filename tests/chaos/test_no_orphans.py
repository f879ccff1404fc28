"""No process of a demo survives, whichever one is killed: not even a child in its own session that ignores SIGTERM."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.demo import fake_project, running_demo

FOREVER = "--trainer.max_steps=100000"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return fake_project(tmp_path)


def test_killing_the_command_line_ends_all_processes_and_removes_the_weights(project: Path) -> None:
    with running_demo(project, FOREVER) as demo:
        demo.wait_for_line("step 1/")
        weights = Path(demo.member("tandem_trainer").environ()["TANDEM__SHARED__WEIGHTS_DIR"])
        assert len(demo.family()) == 7  # the command line, and per service: guard, service, child
        demo.process.kill()
        demo.wait_until_nothing_is_left()
        assert not weights.exists()


@pytest.mark.parametrize("victim", ["generator", "trainer"])
def test_killing_a_service_ends_the_other_and_names_the_killed_one(project: Path, victim: str) -> None:
    with running_demo(project, FOREVER) as demo:
        demo.wait_for_line("step 1/")
        demo.member(f"tandem_{victim}").kill()
        demo.finish()
        assert demo.process.returncode == 1
        assert f"the {victim} was killed by SIGKILL (exit code 137)" in demo.errors
        demo.wait_until_nothing_is_left()


@pytest.mark.parametrize("victim", ["generator", "trainer"])
def test_killing_a_guard_ends_all_processes(project: Path, victim: str) -> None:
    with running_demo(project, FOREVER) as demo:
        demo.wait_for_line("step 1/")
        demo.guard_of(f"tandem_{victim}").kill()
        demo.finish()
        assert demo.process.returncode == 1
        demo.wait_until_nothing_is_left()


def test_killing_the_command_line_during_preparation_ends_the_preparation_script(project: Path) -> None:
    (project / "prepare.py").write_text("import signal; open('started', 'w').close(); signal.pause()")
    with running_demo(project) as demo:
        demo.wait_for_line("Preparing")
        demo.process.kill()
        demo.wait_until_nothing_is_left()
