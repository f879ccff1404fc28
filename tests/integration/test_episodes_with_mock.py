"""Runs with tools, environment classes and agents, configured as users do, with the mock generator.

The mock's policy says random characters; the project's tool parser and environments give them a meaning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.episode_projects import TOOLS, settings, with_code
from support.models import make_tiny_model
from support.projects import Project, assert_same_course, make_projects


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows all characters of the chat template and of the tools' results."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), vocab=75, max_position_embeddings=256)


@pytest.fixture
def make(tmp_path: Path, chat_model: Path) -> Iterator[Any]:
    with make_projects(tmp_path, chat_model) as make_project:
        yield lambda name="project", **trainer: with_code(make_project(name, **trainer))


def trained(project: Project, **env: Any) -> list[dict[str, Any]]:
    ended = project.train(**env)
    assert ended.returncode == 0, ended.stderr
    return project.lines("metrics.jsonl")


def assert_tokens_are_logged(episodes: list[dict[str, Any]]) -> None:
    """Every sampled token has its text and logprobs, beside the message that it is a part of."""
    for one in episodes:
        assert sum(len(span["text"]) for span in one["spans"]) == one["tokens"]
        for span in one["spans"]:
            assert len(span["sampler"]) == len(span["text"]) == sum(tokens for _, tokens in span["versions"])
            assert one["advantage"] == 0 if span["trainer"] is None else len(span["trainer"]) == len(span["text"])
            assert span["message"] is None or one["messages"][span["message"]]["role"] == "assistant"
    assert any(span["trainer"] for one in episodes for span in one["spans"])
    assert any(span["message"] for one in episodes for span in one["spans"])


def test_tools_are_called_and_their_results_are_not_trained(make: Any) -> None:
    project = make(max_steps=2, log_completions=8, **settings(**TOOLS))
    metrics = trained(project)
    episodes = project.lines("rollouts.jsonl")
    assert len(episodes) == 16
    for step, line in enumerate(metrics, start=1):
        of_step = [one for one in episodes if one["step"] == step]
        assert line["rollout_tokens"] == sum(one["tokens"] for one in of_step)
        assert line["tool_calls"] == sum(one["tool_calls"] for one in of_step) > 0
        assert line["tool_errors"] == sum(one["tool_errors"] for one in of_step)
        assert line["turns_mean"] == pytest.approx(sum(one["turns"] for one in of_step) / 8)
        assert line["episodes_failed"] == 0
    results = [m for one in episodes for m in one["messages"] if m["role"] == "tool"]
    assert results
    assert {"error" in m["content"] for m in results if not m["content"].isdecimal()} <= {True}
    assert {one["status"] for one in episodes} <= {"finished", "max_tokens", "max_turns"}
    assert max(one["turns"] for one in episodes) > 1
    assert_tokens_are_logged(episodes)
    assert [sum(line["replica_tokens"].values()) >= line["rollout_tokens"] for line in metrics] == [True, True]


def test_an_environment_answers_in_text_and_gives_the_only_rewards(make: Any) -> None:
    held_out = {"prompts": {"limit": 3} | settings()["prompts"], "every_steps": 1}
    project = make(max_steps=2, log_completions=8, rewards=[], eval=held_out, **settings(environment="episodes:Echo"))
    trained(project)
    for one in project.lines("rollouts.jsonl"):
        assert one["rewards"] == {"Echo": one["reward"]}
        assert one["prompt"].endswith(" go")
    evaluations = project.lines("eval.jsonl")
    assert [(line["step"], line["n"], line["episodes_failed"]) for line in evaluations] == [
        (0, 3, 0),
        (1, 3, 0),
        (2, 3, 0),
    ]
    assert all(line["rewards"] == {"Echo": line["reward_mean"]} for line in evaluations)


def test_an_agent_is_trained_on_what_the_recording_endpoint_sampled(make: Any) -> None:
    project = make(
        max_steps=2, log_completions=8, rewards=[], **settings(agent="episodes:ask_twice", max_completion_length=200)
    )
    for line in trained(project):
        assert line["turns_mean"] == 2
    for one in project.lines("rollouts.jsonl"):
        assert [message["role"] for message in one["messages"]] == ["user", "assistant", "user", "assistant"]
        assert one["rewards"] == {"episodes:ask_twice": one["reward"]}


def with_rows(project: Project, *rows: dict[str, Any]) -> Project:
    (project.directory / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return project


def test_failed_episodes_are_counted_with_their_reason_and_the_run_goes_on(make: Any) -> None:
    project = make(max_steps=2, log_completions=1, **settings(environment="episodes:Echo"))
    with_rows(project, {"prompt": "1+1=", "breaks": False}, {"prompt": "1+2=", "breaks": True})
    metrics = trained(project)
    assert [line["episodes_failed"] for line in metrics] == [4, 4]
    reason = "environment Echo: reset: RuntimeError: the server is gone"
    failed = [one for one in project.lines("rollouts.jsonl") if one["status"] == "failed"]
    assert {(one["reason"], one["reward"], one["tokens"]) for one in failed} == {(reason, None, 0)}
    assert {one["step"] for one in failed} == {1, 2}
    events = [event for event in project.lines("events.jsonl") if event["kind"] == "episodes_failed"]
    assert [event["message"].startswith(f"4 of 8 episodes failed: {reason} (4×)") for event in events] == [True, True]


def test_if_all_episodes_fail_the_run_ends_with_the_reason(make: Any) -> None:
    project = make(**settings(environment="episodes:Echo"))
    with_rows(project, *({"prompt": f"{i}=", "breaks": True} for i in range(4)))
    ended = project.train()
    assert ended.returncode == 2
    assert "environment Echo: reset: RuntimeError: the server is gone" in ended.stderr.splitlines()[-1]


def test_a_killed_run_with_episodes_resumes_bit_for_bit(make: Any) -> None:
    trainer = settings(environment="episodes:Echo", **TOOLS)
    undisturbed, killed = (make(name, max_steps=4, **trainer) for name in ("undisturbed", "killed"))
    trained(undisturbed)
    assert killed.train(ACTION="SIGKILL", AT_CALL="6").returncode == -9
    assert killed.steps == [1, 2]
    trained(killed)
    assert_same_course(killed, undisturbed)


def test_two_ranks_play_the_episodes_of_one_and_learn_the_same(make: Any) -> None:
    trainer = settings({"shuffle": False}, environment="episodes:Echo", **TOOLS)
    alone, two = (make(name, max_steps=2, log_completions=8, **trainer) for name in ("alone", "two"))
    trained(alone)
    assert (ended := two.train(ranks=2)).returncode == 0, ended.stderr
    for ours, theirs in zip(two.lines("metrics.jsonl"), alone.lines("metrics.jsonl"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        for name in ("reward_mean", "grad_norm", "rollout_tokens", "turns_mean", "tool_calls", "episodes_failed"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert_tokens_are_logged(two.lines("rollouts.jsonl"))
    assert two.parameters(2).keys() == alone.parameters(2).keys()
    for name, theirs in alone.parameters(2).items():
        torch.testing.assert_close(two.parameters(2)[name], theirs, atol=1e-5, rtol=0)


def test_episodes_of_other_rewards_are_sampled_again_after_a_resume(make: Any) -> None:
    project = make(max_steps=2, max_lag=1, **settings(environment="episodes:Echo"))
    trained(project)
    resumed = project.train("--trainer.max_steps=4", "--trainer.rewards=[]")
    assert resumed.returncode == 0, resumed.stderr
    assert [set(line["rewards"]) for line in project.lines("metrics.jsonl")[2:]] == [{"Echo"}, {"Echo"}]
