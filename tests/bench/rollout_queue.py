"""Measure how many samples per second a trainer gets if completion lengths have a long tail.

    python tests/bench/rollout_queue.py [--steps 25] [--update-s 0.1]

Queue, client and generators are the real ones: mock generators in processes of their own, with a fixed latency per
token, that decode any number of completions at once. A script gives them the lengths. Each step publishes a version,
which switches in flight. Make many steps: groups that are still in the queue at the end count for nothing, and those
are the long ones. The fixed batches are the rule of the first queue: a step waits for the slowest group of its batch.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from anyio.from_thread import BlockingPortal, start_blocking_portal

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.bench import Table, options, write
from support.generators import TOKEN, running
from support.weights import publish
from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.messages import Prompt, RolloutRequest, SetWeights, SwitchMode
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient
from tandem_rollout.completions import CompletionReader
from tandem_rollout.pool import Counts
from tandem_rollout.prompts import Draw, PromptCursor, PromptRow
from tandem_rollout.queue import Rollouts
from tandem_rollout.sampler import Sampler, sampling
from tandem_rollout.trajectory import Trajectory

REPLICAS, BATCH, SAMPLES, TOKEN_LATENCY_S, LONGEST = 2, 16, 4, 0.01, 256
SCRIPTED = 1024
"""Different completions in the script."""
TIMEOUT_S = 300.0
CONFIG = RolloutConfig(num_prompts=BATCH, num_generations=SAMPLES, max_completion_length=LONGEST)
ROWS = [PromptRow(i, f"row {i}", str(i), str(i), (i % 50 + 1,), {}) for i in range(1000)]
LENGTHS: dict[str, Callable[[random.Random], float]] = {
    "lognormal, sigma 1": lambda chance: chance.lognormvariate(2.7, 1.0),
    "1 of 100 is 20 times longer": lambda chance: 12.0 * (20.0 if chance.random() < 0.01 else 1.0),
}


class Result(NamedTuple):
    rate: float
    """Samples per second."""
    reasked: float
    """Share of the groups that were asked for again."""


class Scorer:
    """Gives the first completion of a group another reward."""

    async def score(self, row: PromptRow, trajectories: Sequence[Trajectory]) -> tuple[Trajectory, ...]:
        return tuple(one.model_copy(update={"reward": float(i == 0)}) for i, one in enumerate(trajectories))


class Generators:
    """Running mock generators, and a client for them."""

    def __init__(self, urls: list[str], store: WeightStore, portal: BlockingPortal) -> None:
        self.portal = portal
        self.client: GeneratorClient = portal.call(lambda: _client(urls))
        tokenizer: Any = SimpleNamespace(batch_decode=lambda ids, **_: ["" for _ in ids])
        scorer: Any = Scorer()
        self.sampler = Sampler(self.client, CompletionReader(tokenizer), scorer)
        self._store = store
        self._attempt = 0

    def start(self) -> Version:
        """The first version of the next trainer."""
        self._attempt += 1
        return self.publish(0)

    def publish(self, step: int) -> Version:
        version = Version(step, self._attempt)
        _, digest = publish(self._store, version)
        weights = SetWeights(manifest_digest=digest, mode=SwitchMode.IN_FLIGHT)
        self.portal.call(self.client.set_weights, version, weights, TIMEOUT_S)
        return version


async def _client(urls: list[str]) -> GeneratorClient:
    return GeneratorClient(urls, TOKEN)


@contextmanager
def generators(length: Callable[[random.Random], float]) -> Iterator[Generators]:
    """Start generators whose completions have such lengths."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root, chance = Path(folder), random.Random(0)
        lengths = [min(LONGEST - 1, max(1, round(length(chance)))) for _ in range(SCRIPTED)]
        (root / "script.jsonl").write_text(json.dumps({"samples": [[[200] * one] for one in lengths]}) + "\n")
        options: tuple[str, ...] = ("--generator.mock.script", str(root / "script.jsonl"))
        options += ("--generator.mock.faults.token_latency_s", str(TOKEN_LATENCY_S))
        urls = []
        for number in range(REPLICAS):
            one = running("mock", "no-model", root / "weights", *options, log=root / f"{number}.log")
            urls.append(f"http://127.0.0.1:{stack.enter_context(one).port}")
        portal = stack.enter_context(start_blocking_portal())
        made = Generators(urls, WeightStore(root / "weights"), portal)
        yield made
        portal.call(made.client.close)


class FixedBatches:
    """The first queue: `max_lag + 1` batches in progress, handed out in order, each when its slowest group is there."""

    def __init__(self, generators: Generators, cursor: PromptCursor, max_lag: int) -> None:
        self._generators, self._cursor, self._max_lag = generators, cursor, max_lag
        self._batches: deque[Future[None]] = deque()

    def start(self, first: Version) -> None:
        self._attempt = first.attempt

    def next(self, min_version: int) -> None:
        version = Version(min_version + self._max_lag, self._attempt)
        while len(self._batches) <= self._max_lag:
            task = self._generators.portal.start_task_soon(self._request, self._cursor.draw(BATCH), version)
            self._batches.append(task)
        self._batches.popleft().result()

    async def _request(self, draws: Sequence[Draw], version: Version) -> None:
        rows = [ROWS[draw.row] for draw in draws]
        prompts = tuple(Prompt(token_ids=ROWS[draw.row].token_ids, seed=draw.seed) for draw in draws)
        request = RolloutRequest(prompts=prompts, sampling=sampling(CONFIG), min_version=version)
        await self._generators.sampler.collect(request, rows, lambda *_: None, timeout_s=TIMEOUT_S)

    def learned(self) -> Counts:
        return Counts()

    def close(self) -> None:
        for batch in self._batches:
            batch.cancel()


def measure(kind: str, generators: Generators, max_lag: int, steps: int, update_s: float) -> Result:
    """Make `steps` steps whose updates take `update_s`."""
    cursor = PromptCursor(len(ROWS), seed=0, shuffle=True)
    if kind == "fixed":
        queue: Any = FixedBatches(generators, cursor, max_lag)
    else:
        queue = Rollouts(
            rows=ROWS,
            cursor=cursor,
            sampler=generators.sampler,
            portal=generators.portal,
            wait=Future.result,
            config=CONFIG,
            prompts_per_step=BATCH,
            max_lag=max_lag,
        )
    queue.start(generators.start())
    reasked = 0
    began = time.perf_counter()
    for step in range(steps):
        queue.next(step - max_lag)
        time.sleep(update_s)
        reasked += queue.learned().reasked
        generators.publish(step + 1)
    seconds = time.perf_counter() - began
    queue.close()
    return Result(steps * BATCH * SAMPLES / seconds, reasked / (steps * BATCH))


def main(steps: int, update_s: float, names: Sequence[str]) -> list[Table]:
    tables = []
    for name in names:
        rows = []
        with generators(LENGTHS[name]) as running_ones:
            base = measure("continuous", running_ones, 0, steps, update_s)
            for max_lag in (0, 1, 4):
                fixed = measure("fixed", running_ones, max_lag, steps, update_s)
                new = measure("continuous", running_ones, max_lag, steps, update_s) if max_lag else base
                ratios = (f"{new.rate / fixed.rate:.2f}", f"{new.rate / base.rate:.2f}", f"{new.reasked:.1%}")
                rows.append([str(max_lag), f"{new.rate:.0f}", *ratios])
        columns = ["`max_lag`", "samples/s", "÷ fixed batches", "÷ `max_lag: 0`", "asked for again"]
        title = f"{name}; {BATCH} groups of {SAMPLES}"
        note = "Each rate was measured once, one after the other, so a ratio is one of two runs."
        tables.append(Table(title=title, columns=columns, rows=rows, note=note))
    return tables


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--update-s", type=float, default=0.1)
    given = parser.parse_args()
    names = list(LENGTHS)[: 1 if given.quick else None]
    write(main(4 if given.quick else given.steps, given.update_s, names), given.result)
