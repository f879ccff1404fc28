"""A simulation of the training loop: the queue of rollouts, generators that decode, updates and publishes.

It has no torch and no clock. A run is a list of events: a completion ends, or the trainer goes on. The rules of the
queue are those of `tandem_rollout.pool`; `tests/unit/test_plan_queue.py` compares the two.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from .costs import Costs

MOST_STEPS, FEWEST_STEPS, COMPLETIONS = 40, 6, 20_000
"""Steps that are measured, after the first ones, in which the queue fills. Large batches vary less and need fewer."""
PATIENCE = 4
"""The same as in the pool."""


class Split(NamedTuple):
    """How devices are divided, and how old samples may be."""

    replicas: int
    trainer_devices: int
    max_lag: int


class Result(NamedTuple):
    """Means per step."""

    wait_s: float
    update_s: float
    publish_s: float
    other_s: float
    generators_busy: float
    """Share of the time in which a generator decodes, as a mean over generators."""
    tokens: float
    reasked: float
    """Groups that were asked for again."""

    @property
    def step_s(self) -> float:
        return self.wait_s + self.update_s + self.publish_s + self.other_s


@dataclass(eq=False)
class Group:
    lengths: list[int]
    left: int = 0
    """Completions that have not ended."""
    asked_at: int | None = None
    """The step that asked for the group. None: it has to be asked for."""
    too_old_at: int | None = None

    @property
    def is_done(self) -> bool:
        return self.asked_at is not None and self.left == 0


@dataclass
class Replica:
    """A generator. All completions that decode get a token at the same time."""

    costs: Costs
    now_s: float = 0.0
    busy_s: float = 0.0
    decoded: float = 0.0
    """Tokens that a completion has got that decodes since the beginning."""
    pause: tuple[float, float] = (0.0, 0.0)
    running: list[tuple[float, int, Group]] = field(default_factory=list)
    """Heap of (`decoded` at the end, number, group)."""
    waiting: deque[tuple[float, int, Group]] = field(default_factory=deque)
    """(earliest start, length, group), in the order of the requests."""
    count: int = 0
    due_s: float = math.inf
    """When a completion ends or begins next."""

    def ask(self, now_s: float, start_s: float, group: Group) -> None:
        """Sample a group from `start_s` on."""
        self.advance(now_s)
        self.waiting.extend((start_s, length, group) for length in group.lengths)
        self._admit()

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting)

    def set_pause(self, from_s: float, to_s: float) -> None:
        """Do not decode for a time, which begins now or later."""
        self.pause = (from_s, to_s)
        self._admit()

    def advance(self, to_s: float) -> int:
        """Decode up to a time. Returns how many groups have ended."""
        ended = 0
        while self.due_s <= to_s:
            is_end = self.due_s == self._end_s()
            self._decode(self.due_s)
            if is_end:
                self.decoded, _, group = heapq.heappop(self.running)
                group.left -= 1
                ended += group.is_done
            self._admit()
        self._decode(to_s)
        return ended

    def _token_s(self) -> float:
        return self.costs.token_s * (1 + (len(self.running) - 1) / self.costs.half_speed_at)

    def _end_s(self) -> float:
        if not self.running:
            return math.inf
        begin, (pause_s, resume_s) = self.now_s, self.pause
        if pause_s <= begin < resume_s:
            begin = resume_s
        end = begin + max(0.0, self.running[0][0] - self.decoded) * self._token_s()
        return end + (resume_s - pause_s if begin < pause_s < end else 0.0)

    def _decode(self, to_s: float) -> None:
        paused_s = max(0.0, min(to_s, self.pause[1]) - max(self.now_s, self.pause[0]))
        if self.running:
            decoding_s = max(0.0, to_s - self.now_s - paused_s)
            self.decoded += decoding_s / self._token_s()
            self.busy_s += decoding_s
        self.now_s = max(self.now_s, to_s)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.costs.max_num_seqs and self.waiting[0][0] <= self.now_s:
            _, length, group = self.waiting.popleft()
            self.count += 1
            heapq.heappush(self.running, (self.decoded + length, self.count, group))
        has_room = self.waiting and len(self.running) < self.costs.max_num_seqs
        self.due_s = min(self._end_s(), max(self.now_s, self.waiting[0][0]) if has_room else math.inf)


_due_s = attrgetter("due_s")
_load = attrgetter("load")


class Queue:
    """The groups between the request and the step that learns from them."""

    def __init__(self, costs: Costs, split: Split, seed: int) -> None:
        self.replicas = [Replica(costs) for _ in range(split.replicas)]
        self.now_s = self.served_s = 0.0
        """`served_s`: when all generators serve the newest version. Requests of a step wait for it."""
        self.reasked = 0
        self._costs, self._lag = costs, split.max_lag
        self._capacity = (split.max_lag + 1) * costs.num_prompts
        self._pool: list[Group] = []
        self._chance = random.Random(seed)  # noqa: S311 - lengths, not a secret
        self._lengths = costs.drawn

    def next(self, step: int) -> list[Group]:
        """Wait for the groups of a step, and remove them."""
        while True:
            self._update(step)
            for group in self._to_ask(step):
                self._ask(group, step)
            if batch := self._batch(step):
                self._pool = [group for group in self._pool if group not in batch]
                return batch
            while not self._advance_one():
                pass

    def _advance_one(self) -> int:
        """Let time pass until a completion ends or begins. The other replicas follow when they have to."""
        replica = min(self.replicas, key=_due_s)
        self.now_s = replica.due_s
        return replica.advance(self.now_s)

    def advance(self, to_s: float) -> int:
        """Let time pass. Returns how many groups have ended."""
        self.now_s = to_s
        return sum(replica.advance(to_s) for replica in self.replicas)

    def publish(self, served_s: float, pause_s: float) -> None:
        """A version is served from `served_s` on. Generators pause before that."""
        self.served_s = served_s
        for replica in self.replicas:
            replica.set_pause(served_s - pause_s, served_s)

    def _update(self, step: int) -> None:
        for group in self._pool:
            if group.is_done and group.asked_at is not None and step - group.asked_at > self._lag:
                group.asked_at, group.too_old_at = None, step
                self.reasked += 1
        while len(self._pool) < self._capacity:
            self._pool.append(Group(self._chance.choices(self._lengths, k=self._costs.num_generations)))

    def _to_ask(self, step: int) -> list[Group]:
        """Groups that are asked for again are asked for together, because a step waits for them."""
        open_ = [group for group in self._pool if group.asked_at is None]
        first = [group for group in open_ if group.too_old_at is None]
        again = [group for group in open_ if group.too_old_at is not None]
        size = self._costs.num_prompts
        since = min((group.too_old_at for group in again if group.too_old_at is not None), default=step)
        is_time = (
            2 * len(again) >= size or step - since >= PATIENCE * (self._lag + 1) or self._capacity - len(again) < size
        )
        asked = sum(group.too_old_at is not None and group.asked_at == step for group in self._pool)
        return [*first, *again[: max(0, size - asked)]] if is_time else first

    def _ask(self, group: Group, step: int) -> None:
        group.asked_at, group.left = step, len(group.lengths)
        replica = min(self.replicas, key=_load)
        replica.ask(self.now_s, max(self.now_s, self.served_s), group)

    def _batch(self, step: int) -> list[Group] | None:
        if sum(group.is_done for group in self._pool) < self._costs.num_prompts:
            return None
        awaited = self._pool if self._lag == 0 else [group for group in self._pool if self._must_wait(group, step)]
        others = [group for group in self._pool if group.is_done and group not in awaited]
        others.sort(key=lambda group: group.asked_at or 0)
        batch = [*awaited, *others][: self._costs.num_prompts]
        return batch if len(batch) == self._costs.num_prompts and all(group.is_done for group in awaited) else None

    def _must_wait(self, group: Group, step: int) -> bool:
        return group.too_old_at is not None and group.asked_at is not None and step - group.asked_at >= self._lag


def simulate(costs: Costs, split: Split, steps: int | None = None, seed: int = 0) -> Result:
    """Simulate a run and return the means of `steps` steps."""
    queue, lag = Queue(costs, split, seed), split.max_lag
    warm_up = 2 * (lag + 1) + 1
    enough = COMPLETIONS // (costs.num_prompts * costs.num_generations)
    steps = steps or min(MOST_STEPS, max(FEWEST_STEPS, enough))
    update_s = costs.update_on(split.trainer_devices)
    waits_s = publishes_s = busy_s = began_s = 0.0
    tokens = reasked = 0
    for step in range(warm_up + steps):
        if step == warm_up:
            waits_s = publishes_s = tokens = 0
            began_s, reasked, busy_s = queue.now_s, queue.reasked, sum(one.busy_s for one in queue.replicas)
        before_s = queue.now_s
        batch = queue.next(step)
        waits_s += queue.now_s - before_s
        tokens += sum(sum(group.lengths) for group in batch)
        queue.advance(updated_s := queue.now_s + update_s)
        if lag:  # one version is in flight at most
            free_s = max(updated_s, queue.served_s) + costs.copy_s
            queue.advance(free_s)
            queue.publish(free_s + max(0.0, costs.publish_s - costs.copy_s), costs.pause_s)
        else:
            queue.advance(free_s := updated_s + costs.publish_s)
        publishes_s += free_s - updated_s
        queue.advance(free_s + costs.other_s)
    taken_s = max(queue.now_s - began_s, 1e-9)
    busy_s = sum(one.busy_s for one in queue.replicas) - busy_s
    return Result(
        wait_s=waits_s / steps,
        update_s=update_s,
        publish_s=publishes_s / steps,
        other_s=costs.other_s,
        generators_busy=busy_s / taken_s / split.replicas,
        tokens=tokens / steps,
        reasked=(queue.reasked - reasked) / steps,
    )
