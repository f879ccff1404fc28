"""What an evaluation says of the groups that it got."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import pytest

from support.rollouts import completion, scored
from tandem_trainer.evaluate import evaluation_record, pass_at_k


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("rewards", [[1.0, 0.0, None, 2.0, 0.5], [0.0] * 5, [1.0] * 5])
def test_pass_at_k_is_the_share_of_all_draws_of_k_samples_with_a_pass(rewards: list[float | None], k: int):
    draws = [any(reward is not None and reward >= 1 for reward in draw) for draw in combinations(rewards, k)]
    assert pass_at_k(rewards, k) == pytest.approx(fmean(draws))


def test_the_record_has_means_over_all_completions_and_pass_rates_over_prompts():
    pair = [completion([5]), completion([6])]
    groups = [scored([4], pair, [1.0, 0.0]), scored([4], pair, [0.5, None], row=1)]
    assert evaluation_record(groups, ["rewards:r"], [1, 2]) == {
        "n": 2,
        "reward_mean": 0.5,
        "rewards": {"rewards:r": 0.5},
        "pass_at": {"rewards:r": {"1": 0.25, "2": 0.5}},
    }
