"""`--check-project` finds a project's mistakes in seconds, without generators."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.models import make_tiny_model
from support.projects import Project
from tandem_trainer.__main__ import main


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    absent_generator: Any = SimpleNamespace(port=1)
    model = make_tiny_model(tmp_path / "model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path / "project", model, absent_generator, tmp_path / "weights")


def check(project: Project, *overrides: str) -> int:
    return main(["--config", str(project.directory / "config.yaml"), "--check-project", *overrides])


def test_a_complete_project_is_described(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(project) == 0
    out = capsys.readouterr().out
    assert "the project is complete: training " in out
    assert "on 9 prompts of prompts.jsonl, scored by odd_rewards:odd" in out
    assert not project.run_dir.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--trainer.rewards=[{function: 'odd_rewards:absent'}]", "odd_rewards has no function 'absent'"),
        ("--trainer.rewards=[{function: 'absent:odd'}]", "importing absent failed"),
        ("--trainer.grpo.loss_type=absent:loss", "importing absent failed"),
        ("--trainer.grpo.loss_type=odd_rewards:odd", "missing a required argument: 'completion_ids'"),
        ("--trainer.grpo.advantage=odd_rewards:absent", "odd_rewards has no function 'absent'"),
        ("--trainer.algorithm=odd_rewards:Absent", "odd_rewards has no class 'Absent'"),
        ("--trainer.prompts.source=absent.jsonl", "absent.jsonl"),
        ("--trainer.prompts.column=absent", "absent"),
        ("--trainer.rollout.max_completion_length=127", "expected at most 1 (the model's length 128"),
    ],
)
def test_a_mistake_is_reported_with_status_2(
    project: Project, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert check(project, override) == 2
    assert message in capsys.readouterr().err


def test_the_number_of_processes_is_compared_with_the_prompts(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_TRAINER_PROCESSES", "3")
    assert check(project) == 2
    assert "num_prompts is 2 for 3 trainer processes" in capsys.readouterr().err


def test_a_reward_that_needs_a_device_at_import_is_not_a_mistake(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.directory / "gpu_rewards.py").write_text("raise RuntimeError('No CUDA GPUs are available')")
    assert check(project, "--trainer.rewards=[{function: 'gpu_rewards:f'}]") == 0
    assert "the project cannot be checked here" in capsys.readouterr().err
