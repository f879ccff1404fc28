"""1,000 random schedules of the queue: nothing is lost or doubled, no group is too old, none is learned from twice.

The driver is seeded and the clock is virtual, so every schedule is the same on every machine. A schedule has groups
that take long, requests that fail, stops while the run waits, and kills that undo the steps since a checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from support.queue_world import STEPS, World, make_world
from support.virtual_time import VirtualLoop

SCHEDULES = 1000
KINDS = [(max_lag, refill) for max_lag in (0, 1, 4, 8) for refill in (False, True)]


@pytest.fixture(scope="module")
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


def check(world: World) -> None:
    assert len(world.learned_draws) == world.step * world.schedule.batch
    check_rows(world)
    assert world.schedule.most_in_flight <= (world.schedule.max_lag + 1) * world.schedule.batch


def check_rows(world: World) -> None:
    found = sorted(world.learned_draws + world.queued_draws)
    assert len({*found}) == len(found), "doubled"
    refilled = sum(counts.refilled for counts in (*world.counts, world.rollouts.learned()))
    missing = {*range(world.cursor.position)} - {*found}
    assert len(missing) == refilled, "lost"
    assert not any(map(world.schedule.has_signal, missing)), "only groups without signal are replaced"
    assert found[-1] < world.cursor.position


@pytest.mark.parametrize(("max_lag", "refill"), KINDS)
def test_nothing_is_lost_or_doubled_or_too_old(loop: VirtualLoop, max_lag: int, refill: bool) -> None:
    replaced = reasked = 0
    for seed in range(SCHEDULES // len(KINDS)):
        world = make_world(seed, loop, max_lag, refill=refill)
        world.run(max(STEPS, 2 * max_lag + 2))  # finds groups that are too old
        check(world)
        replaced += sum(counts.refilled for counts in world.counts)
        reasked += sum(counts.reasked for counts in world.counts)
    assert (replaced > 0) is refill
    assert (reasked > 0) is (max_lag > 0)


def test_other_settings_at_each_resume_lose_and_double_nothing(loop: VirtualLoop) -> None:
    attempts = 0
    for seed in range(100):
        chance = random.Random(seed)
        world = make_world(seed, loop, chance.choice([0, 1, 4, 8]), refill=True, kills=0.2, stops=0.2, useless=0.3)

        def restart(world: World = world, chance: random.Random = chance) -> None:
            world.stop()
            world.schedule.max_lag = chance.choice([0, 1, 2, 4, 8])
            world.schedule.batch = chance.choice([1, 2, 3, 5])
            world.schedule.refill = chance.random() < 0.5
            world.rollouts = world.start()

        world.restart = restart  # type: ignore[method-assign]  # this world changes its settings
        world.run()
        check_rows(world)
        attempts += world.attempt
    assert attempts > 200


@pytest.mark.parametrize("refill", [False, True])
def test_without_lag_stops_and_kills_change_no_batch(loop: VirtualLoop, refill: bool) -> None:
    for seed in range(25):
        calm, disturbed = (
            make_world(seed, loop, 0, refill=refill, failures=much / 8, kills=much, stops=much) for much in (0, 0.4)
        )
        disturbed.schedule.useless = calm.schedule.useless
        calm.run()
        disturbed.run()
        assert disturbed.attempt > 1
        assert disturbed.learned_draws == calm.learned_draws, f"schedule {seed}"
        assert disturbed.counts == calm.counts
        if not refill:
            assert calm.learned_draws == [*range(len(calm.learned))], "the order of the prompts"
