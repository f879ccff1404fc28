"""The simulation of `tandem plan` makes the same steps as the real queue on a virtual clock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from support.queue_world import NUMBERS, ROWS, cursor
from support.rollouts import completion, scored
from support.virtual_time import SameThreadPortal, VirtualLoop
from tandem_cli.plan.costs import Costs
from tandem_cli.plan.simulation import Queue, Split
from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.messages import RolloutRequest
from tandem_protocol.version import Version
from tandem_rollout.prompts import PromptRow
from tandem_rollout.queue import Rollouts
from tandem_rollout.trajectory import Group

STEPS, TOKEN_S, UPDATE_S, PUBLISH_S = 40, 0.01, 3.0, 1.5
COSTS = Costs(
    num_prompts=4,
    num_generations=2,
    lengths=(*range(400, 1200), *range(5900, 6000)),  # many, so that hardly two groups end at the same time
    token_s=TOKEN_S,
    half_speed_at=1e12,  # a completion takes as long as its length, whatever else decodes
    max_num_seqs=1000,
    update_s=UPDATE_S,
)


class World:
    """Generators in which a completion takes TOKEN_S per token, and a trainer that publishes behind its updates."""

    def __init__(self, loop: VirtualLoop, max_lag: int, seed: int) -> None:
        self.loop, self.served_s = loop, loop.time()
        chance = random.Random(seed)
        self.lengths = [chance.choices(COSTS.drawn, k=COSTS.num_generations) for _ in range(len(NUMBERS))]
        portal: Any = SameThreadPortal(loop)
        self.rollouts = Rollouts(
            rows=ROWS,
            cursor=cursor(),
            sampler=self,  # type: ignore[arg-type]  # it samples without a client
            portal=portal,
            wait=loop.run_until_complete,  # type: ignore[arg-type]  # the task is one of this thread
            config=RolloutConfig(num_prompts=COSTS.num_prompts, num_generations=COSTS.num_generations),
            prompts_per_step=COSTS.num_prompts,
            max_lag=max_lag,
        )
        self.rollouts.start(Version(0, 1))

    async def collect(
        self,
        request: RolloutRequest,
        rows: Sequence[PromptRow],
        keep: Callable[[int, Group], object],
        *,
        timeout_s: float,
    ) -> None:
        async def one(index: int, number: int) -> None:
            await asyncio.sleep(max(0.0, self.served_s - self.loop.time()) + TOKEN_S * max(self.lengths[number]))
            tokens = [completion([1], version=request.min_version or Version(0, 1)) for _ in self.lengths[number]]
            keep(index, scored(rows[index].token_ids, tokens, [0.0, 1.0], row=rows[index].index))

        await asyncio.gather(*(one(i, NUMBERS[prompt.seed or 0]) for i, prompt in enumerate(request.prompts)))


def real(max_lag: int, seed: int) -> tuple[list[float], int]:
    """Return the time at which each step has its groups, and the number of groups that were asked for again."""
    loop = VirtualLoop()
    world, times, reasked = World(loop, max_lag, seed), [], 0
    for step in range(STEPS):
        world.rollouts.next(step - max_lag)
        times.append(loop.time())
        loop.pass_time(UPDATE_S)
        world.served_s = loop.time() + (PUBLISH_S if max_lag else 0.0)
        reasked += world.rollouts.learned().reasked
    world.rollouts.close()
    loop.finish()
    loop.close()
    return times, reasked


def simulated(max_lag: int, seed: int) -> tuple[list[float], int]:
    queue, times = Queue(COSTS, Split(3, 1, max_lag), seed), []
    for step in range(STEPS):
        queue.next(step)
        times.append(queue.now_s)
        queue.advance(queue.now_s + UPDATE_S)
        queue.publish(queue.now_s + (PUBLISH_S if max_lag else 0.0), 0.0)
    return times, queue.reasked


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_lag", [0, 1, 4])
def test_steps_begin_when_those_of_the_real_queue_do(max_lag: int, seed: int) -> None:
    times, reasked = simulated(max_lag, seed)
    expected, really_reasked = real(max_lag, seed)
    assert times == pytest.approx(expected)
    assert reasked == really_reasked
    assert (reasked > 0) is (max_lag > 0)
