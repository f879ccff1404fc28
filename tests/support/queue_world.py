"""The queue with a trainer and generators that follow a seeded schedule, on a virtual clock."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from support.rollouts import completion, scored
from support.virtual_time import SameThreadPortal, VirtualLoop
from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.errors import EngineFailed
from tandem_protocol.messages import RolloutRequest
from tandem_protocol.version import Version
from tandem_rollout.pool import Counts
from tandem_rollout.prompts import PromptCursor, PromptRow
from tandem_rollout.queue import Rollouts
from tandem_rollout.trajectory import Group

STEPS = 6
ROWS = [PromptRow(i, f"row {i}", str(i), str(i), (i + 1,), {}) for i in range(7)]


class Stopped(Exception):
    """The run was asked to stop while it waited."""


def cursor() -> PromptCursor:
    return PromptCursor(len(ROWS), seed=0, shuffle=True)


NUMBERS = {draw.seed: number for number, draw in enumerate(cursor().draw(1000))}
"""Seed of a draw → its number. The first token of a completion is this number."""


def number(group: Group) -> int:
    """The number of the draw of a group."""
    return group.trajectories[0].sampled_ids[0]


class Schedule:
    """What the generators do: how long a row takes, whether it has signal, when they fail. Seeded."""

    def __init__(self, seed: int, max_lag: int, *, refill: bool) -> None:
        self.chance = random.Random(seed)
        self.max_lag, self.refill = max_lag, refill
        self.batch = self.chance.choice([1, 2, 3])
        self.update_s = self.chance.choice([0.0, 1.0])
        self.failures = self.chance.choice([0.0, 0.0, 0.02])
        self.kills = self.chance.choice([0.0, 0.2])
        self.stops = self.chance.choice([0.0, 0.2])
        self.useless = self.chance.choice([0.0, 0.3, 0.3, 1.0]) if refill else 0.3
        self.seed = seed
        self.in_flight = self.most_in_flight = 0

    def duration_s(self, draw: int) -> float:
        """The same for the same draw: a long group is long each time."""
        own = random.Random(self.seed * 1000 + draw)
        return 20.0 if own.random() < 0.15 else own.uniform(0.1, 1.5)

    def has_signal(self, draw: int) -> bool:
        return random.Random(-self.seed * 1000 - draw).random() >= self.useless


class Sampler:
    """Answers with tokens of the versions that are served meanwhile."""

    can_score_again = True

    def __init__(self, world: World) -> None:
        self._world = world

    async def collect(
        self,
        request: RolloutRequest,
        rows: Sequence[PromptRow],
        keep: Callable[[int, Group], object],
        *,
        timeout_s: float,
    ) -> None:
        schedule = self._world.schedule

        async def one(index: int, draw: int) -> None:
            began = self._world.version
            assert request.min_version is not None
            assert began >= request.min_version
            await asyncio.sleep(schedule.duration_s(draw))
            if schedule.chance.random() < schedule.failures:
                raise EngineFailed("the generators failed")
            rewards = [0.0, 1.0] if schedule.has_signal(draw) else [1.0, 1.0]
            tokens = [completion([draw], version=began), completion([2], version=self._world.version)]
            keep(index, scored(rows[index].token_ids, tokens, rewards, row=rows[index].index))

        self._world.requests.append([NUMBERS[prompt.seed or 0] for prompt in request.prompts])
        schedule.in_flight += len(rows)
        schedule.most_in_flight = max(schedule.most_in_flight, schedule.in_flight)
        try:
            await asyncio.gather(*(one(i, NUMBERS[prompt.seed or 0]) for i, prompt in enumerate(request.prompts)))
        finally:
            schedule.in_flight -= len(rows)


class World:
    """A trainer that steps, fails, is killed and resumes."""

    def __init__(self, schedule: Schedule, loop: VirtualLoop) -> None:
        self.schedule, self.loop = schedule, loop
        self.step = self.attempt = 0
        self.learned: list[tuple[int, Group]] = []
        """Step and group. What a kill undoes is not in it."""
        self.counts: list[Counts] = []
        self.requests: list[list[int]] = []
        """The numbers of the draws in each request."""
        self.saved: tuple[int, int, str] | None = None
        self.rollouts = self.start()

    @property
    def version(self) -> Version:
        return Version(self.step, self.attempt)

    def start(self) -> Rollouts:
        """Start a trainer from the last checkpoint."""
        self.attempt += 1
        portal: Any = SameThreadPortal(self.loop)
        self.cursor = cursor()
        rollouts = Rollouts(
            rows=ROWS,
            cursor=self.cursor,
            sampler=Sampler(self),  # type: ignore[arg-type]  # it samples without a client
            portal=portal,
            wait=self.wait,
            config=RolloutConfig(num_prompts=self.schedule.batch, num_generations=2, refill=self.schedule.refill),
            prompts_per_step=self.schedule.batch,
            max_lag=self.schedule.max_lag,
        )
        self.step = 0
        count = 0
        if self.saved:
            self.step, count, state = self.saved
            rollouts.load_state_dict(json.loads(state))
        del self.learned[count:]
        del self.counts[self.step :]
        rollouts.start(self.version)
        return rollouts

    def wait(self, task: Any) -> None:
        """Wait as a run does, and stop now and then."""
        if self.schedule.chance.random() < self.schedule.stops:
            self.loop.pass_time(self.schedule.chance.random())
            if not task.done():
                task.cancel()
                raise Stopped
        self.loop.run_until_complete(task)

    def stop(self) -> None:
        """End the process: all of its tasks are cancelled."""
        self.rollouts.close()
        self.loop.finish()

    def restart(self) -> None:
        self.stop()
        self.rollouts = self.start()

    def save(self) -> None:
        self.saved = (self.step, len(self.learned), json.dumps(self.rollouts.state_dict()))

    def run(self, steps: int = STEPS) -> None:
        """Make steps, with failures, stops and kills."""
        while self.step < steps:
            try:
                self.make_step()
            except (EngineFailed, Stopped):  # a run writes a checkpoint then
                self.save()
                self.restart()
        self.stop()

    def make_step(self) -> None:
        chance = self.schedule.chance
        groups = self.rollouts.next(self.step - self.schedule.max_lag)
        assert len(groups) == self.schedule.batch
        assert all(group.lag(self.step) <= self.schedule.max_lag for group in groups), "too old"
        self.loop.pass_time(self.schedule.update_s * chance.random())
        if chance.random() < self.schedule.kills:
            self.restart()  # from the last checkpoint
            return
        self.learned += [(self.step, group) for group in groups]
        self.counts.append(self.rollouts.learned())
        self.step += 1
        if chance.random() < 0.3:
            self.save()

    @property
    def learned_draws(self) -> list[int]:
        """The numbers of the draws that were learned from."""
        return [number(group) for _, group in self.learned]

    @property
    def queued_draws(self) -> list[int]:
        """The numbers of the draws in the queue."""
        (saved,) = self.rollouts.state_dict()["queue"]
        return [NUMBERS[draw["seed"]] for draw in saved["draws"]]


def make_world(seed: int, loop: VirtualLoop, max_lag: int, *, refill: bool = False, **changes: Any) -> World:
    """A world whose schedule has other attributes. See `Schedule`."""
    schedule = Schedule(seed, max_lag, refill=refill)
    for name, value in changes.items():
        setattr(schedule, name, value)
    return World(schedule, loop)
