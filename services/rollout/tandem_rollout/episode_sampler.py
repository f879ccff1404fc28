"""Sample groups of episodes: all episodes of a row are played at the same time, turn by turn."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tandem_protocol.messages import RolloutRequest

from .episode import Sample, Score
from .prompts import PromptRow
from .rewards.scoring import Scorer
from .tasks import task_group
from .trajectory import Group, Trajectory
from .turn_sampler import Rollouts, TurnSampler


class PlayGroup(Protocol):
    """Plays the episodes of one row. See `Player.play_group`."""

    def __call__(
        self, row: PromptRow, index: int, samples: Sequence[Sample], score: Score | None = None
    ) -> Awaitable[Group]:
        """Play one episode for each of `samples`, and score them together."""


@dataclass(frozen=True)
class EpisodeSampler:
    """Samples trajectories of several turns from the generators, and scores them. See `sampler.Sampler`."""

    client: Rollouts
    play: PlayGroup
    scorer: Scorer

    can_score_again = False
    """The objects of environments, and their own rewards, exist only until a group is scored."""

    async def collect(
        self,
        request: RolloutRequest,
        rows: Sequence[PromptRow],
        keep: Callable[[int, Group], object],
        *,
        timeout_s: float,
    ) -> None:
        """Play and score the episodes of `rows`, with the seeds, the sampling and the version of `request`.

        Args:
            keep: called with the index of the row and its group.

        Raises:
            TimeoutError: episodes are not over after `timeout_s`, or their rewards after another `timeout_s`.
            TandemError: a generator refused a turn.
            UserError: a reward function failed.
        """
        scoring: set[int] = set()

        async def play(index: int) -> None:
            async def score(
                row: Any, trajectories: Sequence[Trajectory], environments: Sequence[Any]
            ) -> Sequence[Trajectory]:
                scoring.add(index)
                return await self.scorer.score(row, trajectories, environments)

            samples = self._samples(request, index, timeout_s)
            keep(index, await self.play(rows[index], rows[index].index, samples, score))

        async with task_group() as tasks:
            groups = {index: tasks.create_task(play(index)) for index in range(len(rows))}
            await asyncio.wait(groups.values(), timeout=timeout_s)
            if late := [index for index, group in groups.items() if not group.done() and index not in scoring]:
                raise TimeoutError(
                    f"the episodes of {len(late)} of {len(rows)} rows are not over after {timeout_s:g} s, such as "
                    f"those of {rows[late[0]].where}. Fix: lower trainer.rollout.max_turns or tool_timeout_s, or raise "
                    "trainer.rollout.timeout_s."
                )
            if unscored := (await asyncio.wait(groups.values(), timeout=timeout_s))[1]:
                raise TimeoutError(
                    f"{len(unscored)} of {len(rows)} groups are not scored {timeout_s:g} s after their episodes. The "
                    "reward functions are slow or hang. Fix: make them faster, or raise trainer.rollout.timeout_s."
                )

    def _samples(self, request: RolloutRequest, index: int, timeout_s: float) -> list[Sample]:
        """What samples the turns of each episode of a row."""
        seed = request.prompts[index].seed
        seeds = [None if seed is None else seed + number for number in range(request.sampling.n)]
        return [
            TurnSampler(
                self.client,
                request.sampling,
                seed=one,
                min_version=request.min_version,
                timeout_s=timeout_s,
                session=uuid.uuid4().hex,
            )
            for one in seeds
        ]
