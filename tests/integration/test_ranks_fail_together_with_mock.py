"""If one of two trainer processes fails where both can stop, no step is lost: they write a checkpoint together."""

from __future__ import annotations

from collections.abc import Callable

from support.projects import Project, assert_same_course

SETTINGS = {"max_steps": 3, "checkpoint": {"every_steps": 100}, "learner": {"parallelism": "fsdp2"}}


def test_a_process_whose_rollouts_fail_loses_no_step(make_project: Callable[..., Project]):
    """Process 1 fails in step 3. Process 0 has its rollouts by then, and must not lose them either."""
    project = make_project("failed", **SETTINGS)
    ended = project.train(ranks=2, ACTION="short", AT_CALL="3", AT_RANK="1")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count(" ERROR    reward function odd_rewards:odd") == 1
    assert "Traceback" not in ended.stderr
    assert [path.name for path in (project.run_dir / "checkpoints").iterdir()] == ["000002"]
    assert project.train(ranks=2).returncode == 0
    undisturbed = make_project("undisturbed", **SETTINGS)
    assert undisturbed.train(ranks=2).returncode == 0
    assert_same_course(project, undisturbed)
