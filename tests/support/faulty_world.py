"""A trainer and faulty generators that follow a seeded schedule, with the real client and real HTTP."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as futures_wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from anyio.from_thread import BlockingPortal

from support.mock_replicas import Replica
from support.weights import publish
from tandem_generator.engines.mock import MockPolicy
from tandem_protocol.config.generator import FaultsConfig
from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.messages import RolloutRequest, SetWeights, SwitchMode
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient
from tandem_rollout.completions import CompletionReader
from tandem_rollout.pool import Counts
from tandem_rollout.prompts import PromptCursor, PromptRow
from tandem_rollout.queue import Rollouts
from tandem_rollout.sampler import Sampler, sampling
from tandem_rollout.trajectory import Group, Trajectory
from tandem_rollout.trajectory import Sequence as TokenSequence

STEPS = 5
REPLICAS = 3
MEAN_UPTIME_S = 0.2
TIMEOUT_S = 120.0
ROWS = [PromptRow(i, f"row {i}", str(i), str(i), (i + 1, 2 * i + 1), {}) for i in range(7)]
POLICY = MockPolicy(256, 0)


def cursor() -> PromptCursor:
    return PromptCursor(len(ROWS), seed=0, shuffle=True)


DRAWS = cursor().draw(1000)
NUMBERS = {draw.seed: number for number, draw in enumerate(DRAWS)}
"""Seed of a draw → its number."""


class Stopped(Exception):
    """The run was asked to stop while it waited."""


class Chances:
    """What happens in a schedule, and how often."""

    def __init__(self, seed: int, max_lag: int) -> None:
        self.chance = chance = random.Random(f"{seed} {max_lag}")
        self.replicas = chance.choice([1, 2, 3])
        self.batch = chance.choice([1, 2, 3])
        self.mode = chance.choice([*SwitchMode, SwitchMode.IN_FLIGHT])
        self.restarts = chance.random() < 0.5
        self.kills = chance.choice([0.0, 0.2])
        self.stops = chance.choice([0.0, 0.2])
        self.skips = chance.choice([0.0, 0.2])
        self.refill = chance.random() < 0.3

    def faults(self, index: int) -> FaultsConfig:
        chance = self.chance
        is_in_flight = self.mode is SwitchMode.IN_FLIGHT
        # Another replica has to answer, and tokens that are sampled across a switch would have no true label.
        may_be_stale = index > 0 and not is_in_flight
        # A switch in flight does not wait, so groups of a slow replica become too old.
        slow_s = 0.03 if index > 0 and is_in_flight else 0.001
        return FaultsConfig(
            latency_s=chance.choice([0.0, 0.0, 0.01]),
            token_latency_s=chance.choice([0.0, 0.0003, 0.001, slow_s, slow_s]),
            error_rate=chance.choice([0.0, 0.1, 0.2]),
            drop_rate=chance.choice([0.0, 0.1, 0.2]),
            load_failures=chance.choice([0, 0, 1]),
            stale=may_be_stale and chance.random() < 0.2,
        )

    def has_signal(self, draw: int) -> bool:
        return not self.refill or draw % 3 > 0


class Scorer:
    async def score(self, row: PromptRow, trajectories: Sequence[Trajectory]) -> tuple[Trajectory, ...]:
        return tuple(trajectories)


class NamingSampler(Sampler):
    """The real sampler. It notes the number of the draw as a reward, and whether the group has signal."""

    _has_signal: Callable[[int], bool]

    def __init__(self, generators: GeneratorClient, has_signal: Callable[[int], bool]) -> None:
        tokenizer: Any = SimpleNamespace(batch_decode=lambda ids, **_: [str(one) for one in ids])
        scorer: Any = Scorer()
        super().__init__(generators, CompletionReader(tokenizer), scorer)
        object.__setattr__(self, "_has_signal", has_signal)  # the class is frozen

    async def collect(
        self,
        request: RolloutRequest,
        rows: Sequence[PromptRow],
        keep: Callable[[int, Group], object],
        *,
        timeout_s: float,
    ) -> None:
        def named(index: int, group: Group) -> None:
            draw = NUMBERS[request.prompts[index].seed or 0]
            rewards = [float(i * self._has_signal(draw)) for i in range(len(group.trajectories))]
            keep(index, group.model_copy(update={"trajectories": tuple(
                one.model_copy(update={"reward": reward, "rewards": {"draw": float(draw)}})
                for one, reward in zip(group.trajectories, rewards, strict=True)
            )}))  # fmt: skip

        await super().collect(request, rows, named, timeout_s=timeout_s)


def number(group: Group) -> int:
    """The number of the draw of a group."""
    return int(group.trajectories[0].rewards["draw"] or 0)


class World:
    """Generators with faults, and a trainer that steps, skips, is stopped and killed, and resumes."""

    def __init__(self, chances: Chances, max_lag: int, portal: BlockingPortal, folder: Path, ports: list[int]) -> None:
        self.chances, self.chance, self.max_lag, self.portal = chances, chances.chance, max_lag, portal
        self.config = RolloutConfig(  # a batch that does not come is an error with the client's reasons
            num_prompts=chances.batch,
            num_generations=2,
            max_completion_length=12,
            refill=chances.refill,
            timeout_s=TIMEOUT_S / 2,
        )
        self.store = WeightStore(folder)
        faults = [chances.faults(i) for i in range(chances.replicas)]
        self.labels_are_true = not any(fault.stale for fault in faults)
        self.replicas = [
            Replica(port, self.store, fault, self.chance.getrandbits(32), max_model_len=256)
            for port, fault in zip(ports, faults, strict=False)
        ]
        self.step = self.attempt = self.restarted = 0
        self.used: list[tuple[int, Group]] = []
        """Step and group, learned from or skipped. What a kill undoes is not in it."""
        self.counts: list[Counts] = []
        self.saved: tuple[int, int, int, str] | None = None
        self.ending = asyncio.Event()
        self.restarting = portal.start_task_soon(self.run_replicas, self.chance.getrandbits(32))

    async def run_replicas(self, seed: int) -> None:
        """Start the replicas, and restart them now and then. The trainer's chances do not depend on when."""
        await asyncio.gather(*(replica.start() for replica in self.replicas))
        chance = random.Random(seed)
        while not await self.ends_within(chance.expovariate(1 / MEAN_UPTIME_S)):
            torn = [replica for replica in self.replicas if replica.switcher.failed.is_set()]
            replica = torn[0] if torn else chance.choice(self.replicas)
            # On a slow machine, replicas that ended before they have answered would keep the trainer waiting for ever.
            if torn or (self.chances.restarts and replica.answered):
                await self.restart_replica(replica, chance)
        for replica in self.replicas:
            await replica.kill()

    async def ends_within(self, seconds: float) -> bool:
        await asyncio.wait([asyncio.ensure_future(self.ending.wait())], timeout=seconds)
        return self.ending.is_set()

    async def restart_replica(self, replica: Replica, chance: random.Random) -> None:
        if chance.random() < 0.5:
            replica.switcher.stop()  # refuses requests with status 503
            await asyncio.sleep(chance.uniform(0.0, 0.03))
        await replica.kill()
        await asyncio.sleep(chance.uniform(0.0, 0.03))
        await replica.start()
        self.restarted += 1

    def start(self) -> None:
        """Start a trainer from its last checkpoint."""
        self.attempt += 1
        self.cursor = cursor()
        self.client = GeneratorClient([replica.url for replica in self.replicas], None, stall_timeout_s=TIMEOUT_S)
        self.rollouts = Rollouts(
            rows=ROWS,
            cursor=self.cursor,
            sampler=NamingSampler(self.client, self.chances.has_signal),
            portal=self.portal,
            wait=self.wait,
            config=self.config,
            prompts_per_step=self.chances.batch,
            max_lag=self.max_lag,
            switches_abort=self.chances.mode is SwitchMode.ABORT,
        )
        self.step, used, counts, state = self.saved or (0, 0, 0, None)
        if state:
            self.rollouts.load_state_dict(json.loads(state))
        del self.used[used:]
        del self.counts[counts:]
        self.publish()
        self.rollouts.start(Version(self.step, self.attempt))

    def publish(self) -> None:
        version = Version(self.step, self.attempt)
        _, digest = publish(self.store, version)
        weights = SetWeights(manifest_digest=digest, mode=self.chances.mode)
        self.portal.call(self.client.set_weights, version, weights, TIMEOUT_S)

    def wait(self, task: Future[Any]) -> None:
        """Wait as a run does, and stop now and then."""
        seconds = self.chance.uniform(0.0, 0.1) if self.chance.random() < self.chances.stops else TIMEOUT_S
        futures_wait([task, self.restarting], timeout=seconds, return_when=FIRST_COMPLETED)
        if self.restarting.done():
            self.restarting.result()  # raises what has ended it
        if not task.done():
            task.cancel()
            assert seconds < TIMEOUT_S, "no batch has come"
            raise Stopped

    def stop(self) -> None:
        """End the trainer's process."""
        self.rollouts.close()
        self.portal.call(self.client.close)

    def save(self) -> None:
        self.saved = (self.step, len(self.used), len(self.counts), json.dumps(self.rollouts.state_dict()))

    def run(self) -> None:
        """Make steps, and end everything."""
        try:
            self.start()
            while self.step < STEPS:
                try:
                    self.make_step()
                except Stopped:  # a run writes a checkpoint then
                    self.save()
                    self.restart()
            self.check()
        finally:
            self.end()

    def end(self) -> None:
        """End the trainer and the replicas. Otherwise the portal would wait for the replicas for ever."""
        try:
            self.stop()
        finally:
            self.portal.call(self.ending.set)
            self.restarting.result(TIMEOUT_S)

    def restart(self) -> None:
        self.stop()
        self.start()

    def make_step(self) -> None:
        groups = self.rollouts.next(self.step - self.max_lag)
        assert len(groups) == self.chances.batch
        for group in groups:
            assert group.lag(self.step) <= self.max_lag, "too old"
            assert group.row == DRAWS[number(group)].row
            assert not self.labels_are_true or is_sampled_by_the_policy(group, self.config)
        time.sleep(self.chance.uniform(0.0, 0.02))  # the update
        if self.chance.random() < self.chances.kills:
            self.restart()
            return
        self.used += [(self.step, group) for group in groups]
        if self.chance.random() < self.chances.skips:
            return
        self.counts.append(self.rollouts.learned())
        self.step += 1
        self.publish()
        if self.chance.random() < 0.3:
            self.save()

    def check(self) -> None:
        """Every draw up to the cursor's is used, queued or replaced, and none of them twice."""
        self.counts.append(self.rollouts.learned())
        (saved,) = self.rollouts.state_dict()["queue"]
        queued = [NUMBERS[draw["seed"]] for draw in saved["draws"]]
        found = [*(number(group) for _, group in self.used), *queued]
        assert len({*found}) == len(found), "doubled"
        missing = {*range(self.cursor.position)} - {*found}
        assert len(missing) == sum(counts.refilled for counts in self.counts), "lost"
        assert not any(map(self.chances.has_signal, missing)), "only groups without signal are replaced"
        assert max(found) < self.cursor.position


def is_sampled_by_the_policy(group: Group, config: RolloutConfig) -> bool:
    """Whether each token can follow those before it in the version that it names, and has its logprob there."""
    return all(
        token in candidates and math.isclose(logprob, math.log(candidates[token]), abs_tol=1e-9)
        for trajectory in group.trajectories
        for token, logprob, candidates in _tokens(trajectory.sequences[0], config)
    )


def _tokens(sequence: TokenSequence, config: RolloutConfig) -> Iterator[tuple[int, float, dict[int, float]]]:
    """Yield each sampled token with its logprob, and the candidates for its place with their probabilities."""
    start = sequence.sampled[0].start
    context = POLICY.context(sequence.token_ids[:start])
    versions = (span.version for span in sequence.versions for _ in range(span.tokens))
    for i, version in enumerate(versions, start):
        tokens, probabilities = POLICY.distribution(context, version, sampling(config))
        yield sequence.token_ids[i], sequence.logprobs[i], dict(zip(tokens, probabilities, strict=True))
        POLICY.extend(context, sequence.token_ids[i])
