"""`--check-project` finds mistakes in tools, environments and agents, without generators."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.episode_projects import TOOLS, settings, with_code
from support.models import make_tiny_model
from support.projects import Project
from tandem_trainer.__main__ import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), vocab=75)


@pytest.fixture
def check(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(trainer: dict[str, Any]) -> int:
        absent: Any = SimpleNamespace(port=1)
        project = with_code(Project(tmp_path / "project", model, absent, tmp_path / "weights", **trainer))
        return main(["--config", str(project.directory / "config.yaml"), "--check-project"])

    return run


@pytest.mark.parametrize(
    ("trainer", "described"),
    [
        (settings(**TOOLS), " with the tools count, scored by odd_rewards:odd"),
        (settings(environment="episodes:Echo") | {"rewards": []}, " in environments, scored by the environment itself"),
        (
            settings(environment="episodes:Stack", tool_parser="episodes:calls") | {"rewards": []},
            " in environments with the tools push, size, scored by the environment itself",
        ),
        (settings(agent="episodes:ask_twice", max_completion_length=5000), " with the agent episodes:ask_twice"),
    ],
    ids=["tools", "environment", "environment with tools", "agent"],
)
def test_what_plays_episodes_is_described(
    check: Any, capsys: pytest.CaptureFixture[str], trainer: dict[str, Any], described: str
) -> None:
    assert check(trainer) == 0
    assert described in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"tools": ["episodes:count"]}, "Fix: set trainer.rollout.tool_parser: module:function"),
        ({"tools": ["episodes:absent"]}, "tool episodes:absent: module episodes has no function 'absent'"),
        ({"tools": ["episodes:calls"]}, "tool calls: "),
        ({"tools": ["episodes:count"], "tool_parser": "other"}, "got 'other', expected one of hermes"),
        ({"environment": "episodes:Absent"}, "expected one of: Echo"),
        ({"environment": {"echo": "episodes:Echo"}}, "prompts.jsonl row 0 has environment: None, expected one of echo"),
        ({"environment": "episodes:count"}, "environment count: "),
        ({"agent": "episodes:absent"}, "agent episodes:absent: module episodes has no function 'absent'"),
    ],
)
def test_a_mistake_is_reported_with_status_2(
    check: Any, capsys: pytest.CaptureFixture[str], rollout: dict[str, Any], message: str
) -> None:
    assert check(settings(**rollout)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (settings(environment="episodes:NoReward") | {"rewards": []}, "environment NoReward has no method get_reward"),
        (settings({"chat_template_kwargs": {}}, **TOOLS), "does not show the result of a tool call"),
        (settings(**TOOLS, max_completion_length=120), "expected at most 8 (the model's length 128"),
        (settings({"tools": [{"function": {"name": "f"}}]}, **TOOLS), "prompts.tools is set together with"),
        (settings(agent="episodes:ask_twice", **TOOLS), "both agent and tools are set"),
        (settings(tools=["count"]), "got 'count', expected module:name"),
    ],
    ids=["no rewards", "template", "length", "schemas", "agent and tools", "name"],
)
def test_settings_that_do_not_fit_together_are_refused(
    check: Any, capsys: pytest.CaptureFixture[str], trainer: dict[str, Any], message: str
) -> None:
    assert check(trainer) == 2
    assert message in capsys.readouterr().err
