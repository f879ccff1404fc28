"""The episodes of a row are played together, and what breaks in one of them has a reason."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from support.episodes import Policy, Row, called, completion
from support.play import Made, Scripted, assert_is_what_the_policy_saw, loops, player
from tandem_protocol.errors import EngineFailed
from tandem_protocol.messages import Completion
from tandem_rollout.environments import (
    EnvironmentFailed,
    EnvironmentLost,
    SingleTurns,
    Start,
    Step,
)
from tandem_rollout.trajectory import Trajectory
from tandem_rollout.turns import Turn


@pytest.mark.parametrize("method", ["reset", "step", "rewards"])
async def test_an_environment_that_breaks_fails_the_episode_with_its_reason(method: str) -> None:
    async def breaks(*_: Any) -> Any:
        raise EnvironmentFailed("the server is gone")

    environment = Scripted()
    setattr(environment, method, breaks)
    policy = Policy("Hi.", name="ChatML")
    trajectory = await player(SingleTurns(), name="ChatML").play(environment, Row(), policy)
    assert (trajectory.status, trajectory.reason, trajectory.in_loss) == ("failed", "the server is gone", False)
    assert_is_what_the_policy_saw(trajectory, policy)


async def test_messages_that_the_template_refuses_fail_the_episode() -> None:
    class Odd(Scripted):
        async def step(self, turn: Turn) -> Step:
            return Step([{"role": "assistant", "content": "I speak for you."}])

    trajectory = await player(SingleTurns(), name="Gemma").play(Odd(), Row(), Policy("Hi.", name="Gemma"))
    assert trajectory.status == "failed"
    assert "the chat template refuses the environment's answer" in str(trajectory.reason)


async def test_errors_of_the_generators_are_not_the_environments() -> None:
    async def sample(*_: Any, **__: Any) -> Any:
        raise EngineFailed("out of memory")

    environments = Made(Scripted)
    with pytest.raises(EngineFailed, match="out of memory"):
        await player(environments, name="ChatML").play_group(environments, Row(), 0, [sample] * 3)
    assert [one.closed for one in environments.environments] == [[True]] * 3


async def test_an_environment_is_closed_also_if_another_episode_breaks_the_group_meanwhile() -> None:
    closing = asyncio.Event()

    class Remote(Scripted):
        async def rewards(self) -> dict[str, float | None]:
            self.instance = None
            return {}

        async def close(self, *, failed: bool) -> None:
            closing.set()
            await asyncio.sleep(0.01)
            await super().close(failed=failed)

    async def breaks(*_: Any, **__: Any) -> Any:
        await closing.wait()
        raise EngineFailed("out of memory")

    environments = Made(Remote)
    with pytest.raises(EngineFailed, match="out of memory"):
        await player(environments, name="ChatML").play_group(
            environments, Row(), 0, [Policy("Hi.", name="ChatML"), breaks]
        )
    assert [one.closed for one in environments.environments] == [[False], [True]]


async def test_a_group_is_scored_together_and_its_environments_are_closed_afterwards() -> None:
    environments = Made(Scripted)
    seen: list[Any] = []

    async def score(row: Any, trajectories: Sequence[Trajectory], instances: Sequence[Any]) -> Sequence[Trajectory]:
        seen.extend(instances)
        assert not any(instance.closed for instance in instances)
        return [t.model_copy(update={"reward": float(i)}) for i, t in enumerate(trajectories)]

    policies = [Policy(f"I am {i}.", name="ChatML") for i in range(3)]
    group = await player(environments, name="ChatML").play_group(environments, Row(), 7, policies, score)
    assert (group.row, [t.reward for t in group.trajectories]) == (7, [0.0, 1.0, 2.0])
    assert [t.messages[-1]["content"] for t in group.trajectories] == ["I am 0.", "I am 1.", "I am 2."]
    assert seen == environments.environments
    assert [one.closed for one in environments.environments] == [[False]] * 3


async def test_without_reward_functions_the_environments_own_rewards_count() -> None:
    environments = Made(Scripted)
    policies = [Policy("Hi.", name="ChatML")]
    group = await player(environments, name="ChatML").play_group(environments, Row(), 0, policies)
    assert group.trajectories[0].rewards == {"own": 1.0, "other": None}
    assert group.trajectories[0].reward == 1.0


@pytest.mark.parametrize(("failures", "status"), [(1, "finished"), (2, "failed")])
async def test_a_failed_episode_is_tried_once_more_with_another_environment(failures: int, status: str) -> None:
    left = iter([True] * failures + [False] * 9)

    class Fragile(Scripted):
        async def reset(self, row: Any) -> Start:
            if next(left):
                raise EnvironmentFailed("broken")
            return await super().reset(row)

    environments = Made(Fragile)
    group = await player(environments, name="ChatML").play_group(environments, Row(), 0, [Policy("Hi.", name="ChatML")])
    assert [t.status for t in group.trajectories] == [status]
    assert [one.closed for one in environments.environments] == [[True], [failures == 2]]


async def test_a_cancelled_group_closes_its_environments() -> None:
    environments = Made(Scripted)
    waiting = asyncio.Event()

    async def sample(*_: Any, **__: Any) -> Any:
        waiting.set()
        await asyncio.sleep(60)

    task = asyncio.create_task(player(environments, name="ChatML").play_group(environments, Row(), 0, [sample]))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [one.closed for one in environments.environments] == [[True]]


async def test_episodes_wait_for_their_tools_at_the_same_time() -> None:
    everybody = threading.Barrier(20, timeout=20)

    def meet() -> str:
        """Meet."""
        everybody.wait()
        return "met"

    environments = loops(meet, timeout_s=30)
    policies = [Policy(called("meet"), "Done.") for _ in range(20)]
    group = await player(environments).play_group(environments, Row(), 0, policies)
    assert {t.messages[2]["content"] for t in group.trajectories} == {"met"}


@pytest.mark.parametrize(
    ("error", "turns"), [(EnvironmentFailed("no such file"), [0, 1, 2, 3]), (EnvironmentLost("gone"), [0, 1, 0, 1])]
)
async def test_another_attempt_samples_other_turns_if_the_policy_may_have_caused_the_failure(
    error: Exception, turns: list[int]
) -> None:
    """A turn's number gives its seed. With the same seeds, the policy would say again what broke the environment."""
    asked: list[int] = []

    async def sample(prompt_ids: tuple[int, ...], *, max_tokens: int, turn: int) -> Completion:
        asked.append(turn)
        return completion((5,))

    class Fragile(Scripted):
        async def step(self, turn: Turn) -> Step:
            if len(asked) == 2:
                raise error
            return Step([{"role": "user", "content": "Go on."}], done=len(asked) == 4)

    environments = Made(Fragile)
    group = await player(environments, name="ChatML").play_group(environments, Row(), 0, [sample])
    assert [(t.status, t.turns) for t in group.trajectories] == [("finished", 2)]
    assert asked == turns


async def test_an_episode_that_broke_before_the_first_turn_has_the_same_turns() -> None:
    asked: list[int] = []

    async def sample(prompt_ids: tuple[int, ...], *, max_tokens: int, turn: int) -> Completion:
        asked.append(turn)
        return completion((5,))

    class Late(Scripted):
        async def reset(self, row: Any) -> Start:
            if len(environments.environments) == 1:
                raise EnvironmentFailed("not ready")
            return await super().reset(row)

    environments = Made(Late)
    await player(environments, name="ChatML").play_group(environments, Row(), 0, [sample])
    assert asked == [0]
