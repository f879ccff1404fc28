"""What a step gets from the queue, what it waits for, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from support.queue_world import World, cursor, make_world, number
from support.virtual_time import VirtualLoop
from tandem_protocol.errors import EngineFailed
from tandem_rollout.pool import PATIENCE, REFILL_BATCHES, Counts

CALM = {"failures": 0.0, "kills": 0.0, "stops": 0.0, "useless": 0.0, "update_s": 0.0}


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.finish()
    loop.close()


def calm(loop: VirtualLoop, max_lag: int, durations: dict[int, float], batch: int = 2, **changes: Any) -> World:
    """A world in which the draws take `durations`, and all others 1 s."""
    world = make_world(0, loop, max_lag, **{**CALM, "batch": batch, **changes})
    world.schedule.duration_s = lambda draw: durations.get(draw, 1.0)  # type: ignore[method-assign]  # a fixed schedule
    return world


def step(world: World) -> list[int]:
    """Make a step, and return the numbers of its draws."""
    world.make_step()
    return world.learned_draws[-world.schedule.batch :]


def resumed(world: World) -> World:
    """Continue from the queue's state in a new process."""
    world.save()
    world.restart()
    return world


def test_a_step_does_not_wait_for_a_slow_group(loop: VirtualLoop) -> None:
    world = calm(loop, 1, {0: 100.0})
    assert step(world) == [1, 2]
    assert loop.time() == pytest.approx(1.0)
    assert step(world) == [3, 4]
    assert loop.time() == pytest.approx(2.0)


def test_each_group_has_a_request_of_its_own(loop: VirtualLoop) -> None:
    world = calm(loop, 1, {})
    step(world)
    assert world.requests == [[0], [1], [2], [3]]


def test_without_lag_a_step_is_one_request_and_keeps_the_order(loop: VirtualLoop) -> None:
    world = calm(loop, 0, {0: 5.0})
    assert [step(world), step(world)] == [[0, 1], [2, 3]]
    assert world.requests == [[0, 1], [2, 3]]


def test_groups_that_finish_together_come_in_the_order_of_their_draws(loop: VirtualLoop) -> None:
    world = calm(loop, 2, {})
    assert [step(world) for _ in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_group_that_is_too_old_is_asked_for_again_and_then_waited_for(loop: VirtualLoop) -> None:
    world = calm(loop, 1, {0: 2.5}, batch=2)
    assert [step(world) for _ in range(4)] == [[1, 2], [3, 4], [5, 6], [0, 7]]
    assert [one for one in world.requests if 0 in one] == [[0]] * 2, "the same draw: row and seed"
    assert sum(counts.reasked for counts in world.counts) == 1


def test_a_group_that_is_longer_than_many_steps_is_learned_from(loop: VirtualLoop) -> None:
    world = calm(loop, 1, dict.fromkeys(range(0, 40, 7), 50.0))
    for _ in range(40):
        step(world)
    assert {*range(0, 40, 7)} <= {*world.learned_draws}
    assert {world.requests.count([draw]) for draw in range(0, 40, 7)} == {1, 2}, "at most twice"


def test_groups_that_were_too_old_are_asked_for_together(loop: VirtualLoop) -> None:
    world = calm(loop, 1, {0: 2.5, 9: 4.5}, batch=4)
    while world.requests.count([0]) + world.requests.count([9]) < 4:
        step(world)
    again = [i for i, one in enumerate(world.requests) if one in ([0], [9])][2:]
    assert again[1] - again[0] == 1


def test_one_group_that_was_too_old_is_asked_for_again_after_some_steps(loop: VirtualLoop) -> None:
    world = calm(loop, 1, {0: 2.5}, batch=4)
    while world.requests.count([0]) < 2:
        step(world)
    assert world.step <= 3 + PATIENCE * 2 + 1


def test_no_step_has_to_wait_for_more_than_a_batch(loop: VirtualLoop) -> None:
    world = calm(loop, 2, dict.fromkeys((0, 1, 2), 4.5))
    for _ in range(5):
        step(world)
    slots = [slot for slot in world.rollouts._pool.slots if slot.too_old_at == 4]
    assert [slot.asked_at for slot in slots] == [4, 4, None]
    for _ in range(3):
        step(world)
    assert {0, 1, 2} <= {*world.learned_draws}
    assert world.requests.count([2]) == 2


@pytest.mark.parametrize("max_lag", [0, 1, 4])
def test_groups_without_signal_are_replaced_until_the_batch_is_full(loop: VirtualLoop, max_lag: int) -> None:
    world = calm(loop, max_lag, {}, refill=True)
    world.schedule.has_signal = lambda draw: draw % 3 == 0  # type: ignore[method-assign]  # a fixed schedule
    assert [step(world), step(world)] == [[0, 3], [6, 9]]
    assert world.counts[0].refilled >= 2
    assert sum(counts.refilled for counts in world.counts) == world.cursor.position - 4 - len(world.queued_draws)


@pytest.mark.parametrize("max_lag", [0, 1, 4])
def test_a_step_replaces_a_bounded_number_of_groups(loop: VirtualLoop, max_lag: int) -> None:
    world = calm(loop, max_lag, {}, refill=True, useless=1.0)
    for _ in range(2):
        world.make_step()
    assert world.counts == [Counts(refilled=REFILL_BATCHES * 2)] * 2
    assert not any(group.has_signal for _, group in world.learned)


def test_without_refill_groups_without_signal_are_handed_out(loop: VirtualLoop) -> None:
    world = calm(loop, 1, {}, useless=1.0)
    assert step(world) == [0, 1]
    assert world.counts == [Counts()]


def test_refills_go_on_after_a_resume(loop: VirtualLoop) -> None:
    world = calm(loop, 0, {}, refill=True, useless=1.0)
    task = loop.create_task(world.rollouts._next(0))
    loop.pass_time(3.5)
    task.cancel()
    world = resumed(world)
    world.make_step()
    assert world.counts == [Counts(refilled=REFILL_BATCHES * 2)]
    assert world.cursor.position == REFILL_BATCHES * 2 + 2


@pytest.mark.parametrize("max_lag", [0, 1])
def test_a_step_that_fails_after_it_got_its_groups_gets_them_again(loop: VirtualLoop, max_lag: int) -> None:
    world = calm(loop, max_lag, {})
    before = [number(group) for group in world.rollouts.next(-max_lag)]
    asked = len(world.requests)
    world = resumed(world)
    assert step(world) == before
    assert len([one for one in world.requests[asked:] if {*one} & {*before}]) == 0, "they are not sampled again"
    assert step(resumed(world)) == [2, 3]


def test_the_queue_of_an_earlier_release_is_read(loop: VirtualLoop) -> None:
    world = calm(loop, 1, {})
    step(world)
    (new,) = world.rollouts.state_dict()["queue"]
    assert world.queued_draws == [2, 3]
    further = cursor().draw(6)[4:]
    old = [
        {"draws": new["draws"], "prompts": new["prompts"], "scored": {"1": new["scored"][1]}},
        {"draws": [draw._asdict() for draw in further], "prompts": ["", ""], "scored": {}},
    ]
    world.saved = (1, 2, json.dumps({"cursor": 6, "queue": old}))
    world.requests.clear()
    world.restart()
    assert world.queued_draws == [2, 3, 4, 5]
    assert step(world) == [2, 3]
    assert [3] not in world.requests
    assert step(world) == [4, 5]


@pytest.mark.parametrize("max_lag", [0, 1])
def test_a_step_does_not_wait_for_a_request_that_something_has_cancelled(loop: VirtualLoop, max_lag: int) -> None:
    world = calm(loop, max_lag, {})
    step(world)

    def cancel_all(draw: int) -> float:
        for slot in world.rollouts._pool.slots:
            if slot.task:
                slot.task.cancel()
        return 1.0

    world.schedule.duration_s = cancel_all  # type: ignore[method-assign]  # a function of the project
    with pytest.raises(EngineFailed, match="without all groups"):
        [step(world) for _ in range(3)]
