"""The simulation of `tandem plan`, in cases whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from tandem_cli.plan.costs import Costs
from tandem_cli.plan.simulation import Split, simulate

NEVER = 1e12
"""A `half_speed_at` with which completions do not slow each other down."""
LENGTH, TOKEN_S = 20, 0.1
GENERATION_S = LENGTH * TOKEN_S
"""Seconds of a batch whose completions all decode side by side."""


def make(**changes: Any) -> Costs:
    values = {"num_prompts": 4, "num_generations": 2, "lengths": (LENGTH,), "token_s": TOKEN_S}
    return Costs.model_validate({**values, "half_speed_at": NEVER, "update_s": 0.5, "max_num_seqs": 8, **changes})


def test_without_lag_a_step_takes_the_sum_of_its_phases() -> None:
    result = simulate(make(publish_s=0.25, copy_s=0.2, pause_s=0.1, other_s=0.125), Split(1, 1, 0))
    assert result.step_s == pytest.approx(GENERATION_S + 0.5 + 0.25 + 0.125)
    assert (result.wait_s, result.publish_s) == pytest.approx((GENERATION_S, 0.25))
    assert result.generators_busy == pytest.approx(GENERATION_S / result.step_s)
    assert result.tokens == 8 * LENGTH


@pytest.mark.parametrize("update_s", [0.5, 1.9, 2.1, 7.0])
@pytest.mark.parametrize("max_lag", [1, 4])
def test_with_lag_a_step_takes_as_long_as_the_slower_side(update_s: float, max_lag: int) -> None:
    result = simulate(make(update_s=update_s), Split(1, 1, max_lag), steps=1000)
    assert result.step_s == pytest.approx(max(GENERATION_S, update_s))
    # The queue is full at the beginning, which takes the generators many steps to work off if they are hardly faster.
    assert result.generators_busy == pytest.approx(min(1.0, GENERATION_S / update_s), rel=0.02)


@pytest.mark.parametrize(("replicas", "expected_s"), [(1, GENERATION_S), (2, GENERATION_S / 2), (4, GENERATION_S / 4)])
def test_generators_without_a_free_place_scale_with_their_number(replicas: int, expected_s: float) -> None:
    result = simulate(make(update_s=0.0, max_num_seqs=2, num_prompts=1), Split(replicas, 1, 7))
    assert result.step_s == pytest.approx(expected_s)


@pytest.mark.parametrize("completions", [1, 2, 5])
def test_a_completion_decodes_at_half_the_speed_beside_half_speed_at_others(completions: int) -> None:
    costs = make(num_prompts=1, num_generations=completions, half_speed_at=1.0)
    assert simulate(costs, Split(1, 1, 0)).wait_s == pytest.approx(completions * GENERATION_S)


def test_a_long_tail_holds_up_fixed_batches_but_not_a_refilled_queue() -> None:
    """One place: without lag and with it, the generator decodes all tokens one after the other."""
    tail = make(lengths=(5,) * 9 + (100,), update_s=0.0, max_num_seqs=1, num_generations=1)
    means = [simulate(tail, Split(1, 1, lag), steps=400).step_s for lag in (0, 8)]
    assert means == [pytest.approx(4 * tail.mean_length * TOKEN_S, rel=0.2)] * 2
    side_by_side = tail.model_copy(update={"max_num_seqs": 64})
    fixed_s, refilled_s = (simulate(side_by_side, Split(1, 1, lag), steps=400).step_s for lag in (0, 8))
    longest = 1 - 0.9**4  # probability that one of four is long
    assert fixed_s == pytest.approx((longest * 100 + (1 - longest) * 5) * TOKEN_S, rel=0.1)
    assert refilled_s < fixed_s / 4


def test_an_update_on_more_devices_is_faster_by_the_stated_efficiency() -> None:
    costs = make(update_s=8.0, trainer_devices=2, trainer_efficiency=0.75)
    assert [costs.update_on(devices) for devices in (1, 2, 4, 8)] == pytest.approx([12.0, 8.0, 8 / 1.5, 8 / 2.25])


def test_generators_pause_for_a_version_and_the_trainer_only_for_the_copy() -> None:
    slow = make(update_s=0.5, publish_s=0.4, copy_s=0.1, pause_s=0.3)
    result = simulate(slow, Split(1, 1, 4))
    assert result.publish_s == pytest.approx(0.1)
    assert result.step_s == pytest.approx(GENERATION_S + 0.3), "the generators limit the speed, and pause once per step"


def test_one_version_is_in_flight_at_most() -> None:
    result = simulate(make(lengths=(1,), update_s=0.5, publish_s=3.0, copy_s=0.25), Split(1, 1, 8))
    assert result.step_s == pytest.approx(3.0), "of which the copy and the rest of a publish are never side by side"
