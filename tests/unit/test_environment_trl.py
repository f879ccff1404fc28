"""A class written for TRL's `environment_factory` runs as it does there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from support.environment_classes import CodeEnv, CounterEnv, GridEnv, WordEnv, play, play_one, said, started
from support.episodes import Row, called, renderer
from tandem_rollout.errors import UserError
from tandem_rollout.trajectory import Trajectory


async def test_trl_counter_finds_its_own_task_and_rewards_itself() -> None:
    goal = random.Random(3).randint(1, 6)
    right = await play_one(CounterEnv, called("raise_by", amount=goal), "Done.", row=Row(prompt=None))
    assert said(right) == [("user", f"Raise the counter to {goal}."), ("tool", str(goal))]
    assert (right.rewards, right.reward, right.status) == ({"CounterEnv": 1.0}, 1.0, "finished")
    wrong = await play_one(CounterEnv, "It is done already.", row=Row(prompt=None))
    assert wrong.rewards == {"CounterEnv": 0.0}


def reward_func(environments, **kwargs) -> list[float]:
    return [env.reward for env in environments]


async def reward_by_environment(
    row: Row, trajectories: Sequence[Trajectory], instances: Sequence[Any]
) -> Sequence[Trajectory]:
    rewards = reward_func(environments=instances, prompts=[row.prompt] * len(trajectories))
    return [t.model_copy(update={"reward": r}) for t, r in zip(trajectories, rewards, strict=True)]


async def test_trl_wordle_adds_its_observation_and_ends_by_raising() -> None:
    environments = await started(WordEnv)
    row = Row([{"role": "user", "content": "Guess the word."}], (), {"word": "crane"})
    guesses = [called("guess", guess=word) for word in ("crate", "crane", "crank")]
    group = await play(environments, *guesses, "I won.", row=row, size=2, score=reward_by_environment)
    for trajectory in group.trajectories:
        assert said(trajectory) == [
            ("user", "Guess the word. It has 5 letters."),
            ("tool", "cra_e"),
            ("tool", "crane"),
            ("tool", '{"error": "ValueError: Game over."}'),
        ]
        assert (trajectory.tool_calls, trajectory.tool_errors, trajectory.reward) == (3, 1, 1.0)


async def test_trl_several_environments_are_selected_by_a_column_and_show_only_their_tools() -> None:
    environments = await started({"code": CodeEnv, "grid": GridEnv})
    seen: list[Any] = []

    async def score(row: Row, trajectories: Sequence[Trajectory], instances: Sequence[Any]) -> Sequence[Trajectory]:
        seen.extend(instances)
        return trajectories

    columns = {"environment": "code", "level": [1]}
    code = await play(environments, called("move", way="up"), "x", row=Row(None, (), columns), score=score)
    assert said(code.trajectories[0])[1] == ("tool", '{"error": "there is no tool \'move\', only: run_code"}')
    assert seen[0].seen == {"level": [1]}  # the column environment is not an argument
    assert seen[0].seen["level"] is not columns["level"]  # and what is one is a copy
    prompt = renderer("Qwen 3, thinking").text([{"role": "user", "content": "?"}], environments.schemas[:1])
    assert "run_code" in prompt
    row = Row("Go.", (), {"environment": "grid", "size": 5, "other": 1})
    grid = await play(environments, called("move", way="up") + called("move", way="left"), "x", row=row)
    assert said(grid.trajectories[0])[1] == ("tool", "up of 5")
    assert "way: expected 'up' or 'down'" in said(grid.trajectories[0])[2][1]
    assert grid.trajectories[0].rewards == {"GridEnv": 0.5}
    assert code.trajectories[0].rewards == {}


async def test_rows_that_select_nothing_or_lack_a_column_are_refused_at_the_start() -> None:
    class Strict:
        def reset(self, size: int, **columns: Any) -> None:
            pass

    several = await started({"code": CodeEnv, "grid": GridEnv})
    good = Row(columns={"environment": "code"})
    several.check_rows([good])
    for wrong in ({"environment": "chess"}, {}, {"environment": None}):
        with pytest.raises(UserError, match=r"row 1 has environment: .* expected one of code, grid\. Fix"):
            several.check_rows([good, Row(columns=wrong)])
    with pytest.raises(
        UserError, match="Strict: reset cannot be called for row 0: missing a required argument: 'size'"
    ):
        (await started(Strict)).check_rows([Row(columns={"other": 1})])


async def test_an_observation_behind_a_system_message_is_a_message_of_the_user() -> None:
    row = Row([{"role": "system", "content": "Be brief."}])
    trajectory = await play_one(CodeEnv, "Hi.", row=row)
    assert said(trajectory) == [("system", "Be brief."), ("user", "Compute it.")]
    assert row.prompt == [{"role": "system", "content": "Be brief."}]
