"""Which groups a step waits for, and which requests have failed without an error."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from support.rollouts import completion, scored
from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.errors import EngineFailed
from tandem_protocol.version import Version
from tandem_rollout.pool import REFILL_BATCHES, Counts, Pool
from tandem_rollout.prompts import Draw, PromptCursor, PromptRow
from tandem_rollout.queue import Rollouts
from tandem_rollout.trajectory import Group


def group(step: int, rewards: Sequence[float] = (1.0,)) -> Group:
    return scored((1,), [completion([5], version=Version(step, 1)) for _ in rewards], rewards, row=0)


@pytest.mark.parametrize("switches_abort", [False, True])
def test_if_switches_abort_a_step_waits_for_what_the_next_switch_would_begin_again(switches_abort: bool) -> None:
    pool = Pool(1, 1, refill=False, switches_abort=switches_abort)
    pool.update(0, lambda count: [Draw(row=0, seed=number) for number in range(count)])
    long, short = pool.slots
    long.asked_at = short.asked_at = 0
    short.put(group(0))
    assert pool.batch(0) == [short], "nothing was aborted so far"
    assert pool.batch(1) == (None if switches_abort else [short])
    long.put(group(1))
    assert pool.batch(1) == ([long] if switches_abort else [short])


def test_after_the_last_refill_a_step_prefers_groups_with_signal_to_older_ones_without() -> None:
    pool = Pool(1, 2, refill=True)
    draw = iter(range(1000))
    for _ in range(REFILL_BATCHES + 1):
        pool.update(1, lambda count: [Draw(row=0, seed=next(draw)) for _ in range(count)])
        useless, useful, _ = pool.slots
        useless.put(group(0))
    assert pool.counts.refilled == REFILL_BATCHES
    useful.put(group(1, rewards=(1.0, 0.0)))
    assert pool.batch(1) == [useful]


def test_a_group_without_signal_that_is_too_old_as_well_is_replaced_and_not_asked_for_again() -> None:
    """The last refill of a step leaves groups without signal, and later steps replace them."""
    pool = Pool(1, 1, refill=True)
    draw = iter(range(1000))

    def further(count: int) -> list[Draw]:
        return [Draw(row=0, seed=next(draw)) for _ in range(count)]

    for _ in range(REFILL_BATCHES + 1):
        pool.update(1, further)
        useless, useful = pool.slots
        useless.put(group(0))
    useful.put(group(1, rewards=(1.0, 0.0)))
    assert pool.batch(1) == [useful]
    pool.hand_out([useful])
    pool.forget_handed()
    pool.take_counts()
    pool.update(2, further)
    assert useless not in pool.slots
    assert pool.counts == Counts(refilled=1, reasked=0)


class Cancelled:
    """A sampler whose requests end without groups and without an error, as when a child task was cancelled."""

    can_score_again = True

    async def collect(self, request: Any, rows: Any, keep: Any, *, timeout_s: float) -> None:
        pass


class Foreign(Cancelled):
    """One that raises what is not an `Exception`."""

    async def collect(self, request: Any, rows: Any, keep: Any, *, timeout_s: float) -> None:
        class Timeout(BaseException):
            pass

        raise Timeout("gevent's")


@pytest.mark.parametrize("max_lag", [0, 1])
@pytest.mark.parametrize(("sampler", "message"), [(Cancelled(), "without all groups"), (Foreign(), "gevent's")])
def test_a_request_that_ends_without_its_groups_is_an_error(max_lag: int, sampler: Any, message: str) -> None:
    rows = [PromptRow(number, f"row {number}", "p", "p", (1,), {}) for number in range(4)]

    def wait(task: Future[Any]) -> None:
        task.exception(timeout=60)

    with start_blocking_portal() as portal:
        rollouts = Rollouts(
            rows=rows,
            cursor=PromptCursor(4, seed=0, shuffle=False),
            sampler=sampler,
            portal=portal,
            wait=wait,
            config=RolloutConfig(num_prompts=1, num_generations=2),
            prompts_per_step=1,
            max_lag=max_lag,
        )
        with pytest.raises(EngineFailed, match=message):
            rollouts.next(-max_lag)
