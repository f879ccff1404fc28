"""Servers with fewer sessions than episodes: the episodes take turns, and none waits for one that waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.environment_classes import CounterEnv, player, started
from support.environment_servers import Replica, connected
from support.episodes import Policy, Row, called
from support.play import add, loops
from tandem_rollout.environments import servers
from tandem_rollout.trajectory import Trajectory


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "RETRY_PAUSE_S", 0.01)
    monkeypatch.setattr(servers, "FULL_PAUSE_S", 0.01)


@pytest.mark.parametrize(("rooms", "groups"), [([1], 1), ([3], 1), ([2, 5], 6)], ids=str)
async def test_groups_that_are_larger_than_the_servers_are_played_a_few_episodes_at_a_time(
    rooms: list[int], groups: int
) -> None:
    replicas = [Replica(loops(add), max_sessions=room) for room in rooms]
    environments, _ = await connected(*replicas, open_timeout_s=60.0)
    scored = []

    async def score(row: Any, trajectories: Any, instances: Any) -> list[Trajectory]:
        scored.append((len(trajectories), sum(len(replica.sessions) for replica in replicas)))
        return list(trajectories)

    one = player(environments)
    policies = [[Policy(called("add", a=number, b=2), "x") for number in range(4)] for _ in range(groups)]
    async with asyncio.timeout(60):
        playing = [one.play_group(environments, Row(), row, samples, score) for row, samples in enumerate(policies)]
        played = await asyncio.gather(*playing)
    assert [trajectory.status for group in played for trajectory in group.trajectories] == ["finished"] * 4 * groups
    assert [size for size, _ in scored] == [4] * groups
    assert scored[-1][1] == 0, "no session stays open while rewards are computed"


async def test_an_episode_that_is_tried_again_leaves_its_room_first() -> None:
    environments, network = await connected(replica := Replica(await started(CounterEnv), max_sessions=1))

    class Breaks(Policy):
        async def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if not self.calls:
                network.breaks = 2
            return await super().__call__(*args, **kwargs)

    policy = Breaks(called("raise_by", amount=3), "Done.")
    async with asyncio.timeout(60):
        group = await player(environments).play_group(environments, Row(prompt=None), 0, [policy])
    (trajectory,) = group.trajectories
    assert (trajectory.status, trajectory.reason, len(policy.calls)) == ("finished", None, 3)
    assert len(replica.sessions) == 0
