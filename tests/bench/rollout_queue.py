"""Measure how many samples per second a trainer gets if completion lengths have a long tail.

    python tests/bench/rollout_queue.py [--steps 40] [--update-s 0.1]

The queue is the real one, on the real clock. Make many steps: groups that are still in the queue at the end count for
nothing, and those are the long ones. The sampler stands in for generators that decode any number of groups at
once, at a fixed latency per token: it sleeps for the longest completion of a group. The mock generator cannot be used
here, because it decodes the groups of one request one after the other, which would slow down `max_lag` 0 and the fixed
batches only. The fixed batches are the rule of the first queue: a step waits for the slowest group of its own batch.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from anyio.from_thread import BlockingPortal, start_blocking_portal

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.rollouts import completion, scored
from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.messages import RolloutRequest
from tandem_protocol.version import Version
from tandem_rollout.pool import Counts
from tandem_rollout.prompts import PromptCursor, PromptRow
from tandem_rollout.queue import Rollouts
from tandem_rollout.trajectory import Group

BATCH, SAMPLES, TOKEN_LATENCY_S, LONGEST = 16, 8, 0.002, 512
ROWS = [PromptRow(i, f"row {i}", str(i), str(i), (i + 1,), {}) for i in range(1000)]
LENGTHS: dict[str, Callable[[random.Random], float]] = {
    "lognormal, sigma 1": lambda chance: chance.lognormvariate(3.5, 1.0),
    "1 of 100 is 20 times longer": lambda chance: 25.0 * (20.0 if chance.random() < 0.01 else 1.0),
}


class Result(NamedTuple):
    rate: float
    """Samples per second."""
    reasked: float
    """Share of the groups that were asked for again."""


class Sampler:
    """Sleeps as long as generators decode, and answers with the version that served at the start."""

    can_score_again = True

    def __init__(self, length: Callable[[random.Random], float]) -> None:
        self._length = length
        self.step = 0

    async def collect(
        self, request: RolloutRequest, rows: Sequence[PromptRow], keep: Callable[[int, Group], object], **_: Any
    ) -> None:
        async def one(index: int, seed: int) -> None:
            version = Version(self.step, 1)
            await asyncio.sleep(TOKEN_LATENCY_S * max(self.tokens(seed)))
            pair = [completion([1 + seed % 50, index + 1], version=version), completion([2], version=version)]
            keep(index, scored(rows[index].token_ids, pair, [0.0, 1.0], row=rows[index].index))

        await asyncio.gather(*(one(i, prompt.seed or 0) for i, prompt in enumerate(request.prompts)))

    def tokens(self, seed: int) -> list[int]:
        """Lengths of the completions of a group."""
        chance = random.Random(seed)
        return [min(LONGEST, max(1, round(self._length(chance)))) for _ in range(SAMPLES)]


class FixedBatches:
    """The first queue: `max_lag + 1` batches in progress, handed out in order, each when its slowest group is there."""

    def __init__(self, sampler: Sampler, portal: BlockingPortal, cursor: PromptCursor, max_lag: int) -> None:
        self._sampler, self._portal, self._cursor, self._max_lag = sampler, portal, cursor, max_lag
        self._batches: deque[Future[None]] = deque()

    def next(self, _: int) -> None:
        while len(self._batches) <= self._max_lag:
            seeds = [draw.seed for draw in self._cursor.draw(BATCH)]
            self._batches.append(self._portal.start_task_soon(self._decode, seeds))
        self._batches.popleft().result()

    async def _decode(self, seeds: Sequence[int]) -> None:
        await asyncio.sleep(TOKEN_LATENCY_S * max(max(self._sampler.tokens(seed)) for seed in seeds))

    def learned(self) -> Counts:
        return Counts()

    def close(self) -> None:
        for batch in self._batches:
            batch.cancel()


def measure(kind: str, length: Callable[[random.Random], float], max_lag: int, steps: int, update_s: float) -> Result:
    """Make `steps` steps whose updates take `update_s`."""
    sampler = Sampler(length)
    cursor = PromptCursor(len(ROWS), seed=0, shuffle=True)
    with start_blocking_portal() as portal:
        if kind == "fixed":
            queue: Any = FixedBatches(sampler, portal, cursor, max_lag)
        else:
            queue = Rollouts(
                rows=ROWS,
                cursor=cursor,
                sampler=sampler,  # type: ignore[arg-type]  # it samples without a client
                portal=portal,
                wait=Future.result,
                config=RolloutConfig(num_prompts=BATCH, num_generations=SAMPLES),
                prompts_per_step=BATCH,
                max_lag=max_lag,
            )
            queue.start(Version(0, 1))
        reasked = 0
        began = time.perf_counter()
        for step in range(steps):
            sampler.step = step
            queue.next(step - max_lag)
            time.sleep(update_s)
            reasked += queue.learned().reasked
        seconds = time.perf_counter() - began
        queue.close()
    return Result(steps * BATCH * SAMPLES / seconds, reasked / (steps * BATCH))


def main(steps: int, update_s: float) -> None:
    for name, length in LENGTHS.items():
        print(f"{name}; {BATCH} groups of {SAMPLES}, {TOKEN_LATENCY_S} s per token, update {update_s} s")
        base = measure("continuous", length, 0, steps, update_s)
        for max_lag in (0, 1, 4):
            fixed = measure("fixed", length, max_lag, steps, update_s)
            new = measure("continuous", length, max_lag, steps, update_s) if max_lag else base
            print(
                f"max_lag {max_lag}: continuous {new.rate:6.0f} samples/s   fixed {fixed.rate:6.0f}   continuous ÷ "
                f"fixed = {new.rate / fixed.rate:.2f}   ÷ max_lag 0 = {new.rate / base.rate:.2f}   "
                f"asked again: {new.reasked:.1%} of the groups",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--update-s", type=float, default=0.1)
    arguments = parser.parse_args()
    main(arguments.steps, arguments.update_s)
