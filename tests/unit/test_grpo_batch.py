"""Scored groups become advantages and the rows to train on."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from support.rollouts import completion, scored, with_rewards
from tandem_protocol.config.trainer import TrainerConfig
from tandem_trainer.algorithms.advantages import advantages
from tandem_trainer.algorithms.grpo import Grpo

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl-1.16-losses.json").read_text())["advantages"]
NAN = float("nan")


def _grpo(weights: tuple[float, ...] = (1.0,), **options: Any) -> Grpo:
    rewards = [{"function": f"rewards:r{i}", "weight": weight} for i, weight in enumerate(weights)]
    return Grpo(TrainerConfig.model_validate({"max_steps": 1, "rewards": rewards, "grpo": options}))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl(scale: Any):
    rewards = torch.tensor([NAN if r is None else r for r in GOLDEN["rewards"]], dtype=torch.float64)
    got = advantages(rewards.view(-1, GOLDEN["group_size"]), scale)
    expected = torch.tensor(GOLDEN[f"scale_{scale}"], dtype=torch.float64)
    torch.testing.assert_close(got.flatten(), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_and_lone_rewards_give_no_advantage(scale: Any):
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.7, NAN, NAN], [NAN, NAN, NAN]], dtype=torch.float64)
    assert advantages(rewards, scale).tolist() == [[0.0] * 3] * 3


def _standard(values: list[float]) -> list[float]:
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return [(value - mean) / (deviation + 1e-4) for value in values]


def test_normalize_then_sum_scales_each_reward_in_its_group_and_the_sum_over_the_batch():
    completions = [completion([6]), completion([7]), completion([8])]
    first = [[1.0, 0.0, 0.0], [0.0, 2.0, 5.0]]
    second = [[30.0, 20.0, 20.0], [7.0, 7.0, 1.0]]
    groups = [
        with_rewards(scored([5], completions, [0.0, 0.0, 0.0]), **{"rewards:r0": a, "rewards:r1": b})
        for a, b in zip(first, second, strict=True)
    ]
    got = _grpo((1.0, 0.5), multi_objective_aggregation="normalize_then_sum", beta=0.1).make_batch(groups)
    sums = [
        x + 0.5 * y for a, b in zip(first, second, strict=True) for x, y in zip(_standard(a), _standard(b), strict=True)
    ]
    assert got.advantages_B.tolist() == pytest.approx(_standard(sums), abs=1e-6)


def test_normalize_then_sum_counts_a_missing_reward_as_the_mean():
    groups = [
        with_rewards(
            scored([5], [completion([6]), completion([7]), completion([8])], [0.0, 0.0, None]),
            **{"rewards:r0": (1.0, 0.0, None), "rewards:r1": (None, 3.0, None)},
        )
    ]
    got = _grpo((1.0, 1.0), multi_objective_aggregation="normalize_then_sum").make_batch(groups)
    assert got.token_ids_BS[:, 1].tolist() == [6, 7]  # the third has no reward
    assert got.advantages_B.tolist() == pytest.approx(_standard(_standard([1.0, 0.0])), abs=1e-6)


@pytest.mark.parametrize(
    "options", [{"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}], ids=str
)
def test_scaling_over_the_batch_includes_all_ranks(options: dict[str, Any]):
    completions = [completion([6]), completion([7]), completion([8])]
    groups = [scored([5], completions, rewards) for rewards in ([1.0, 0.0, 0.2], [3.0, 0.0, 9.0])]
    unsplit = _grpo(**options).make_batch(groups)
    values: list[list[float]] = []

    def spy(mine: list[float]) -> list[float]:
        values.append(mine)
        return mine

    for group in groups:
        _grpo(**options).make_batch([group], spy)
    everyones = [value for mine in values for value in mine]
    parts = [_grpo(**options).make_batch([group], lambda _: everyones) for group in groups]
    torch.testing.assert_close(torch.cat([part.advantages_B for part in parts]), unsplit.advantages_B)


def test_batch_leaves_out_rows_without_gradient_but_counts_them_in_the_totals():
    groups = [
        scored([5], [completion([6, 7]), completion([8])], [1.0, 0.0]),
        scored([5], [completion([6, 7, 8]), completion([9, 9, 9, 9])], [0.5, 0.5]),
        scored([5], [completion([6]), completion([7])], [None, None]),
    ]
    batch = _grpo(scale_rewards="none").make_batch(groups)
    assert batch.advantages_B.tolist() == [0.5, -0.5]
    assert batch.token_ids_BS.tolist() == [[5, 6, 7], [5, 8, 0]]
    assert (batch.trajectory_total, batch.token_total) == (4, 10)
    assert batch.has_signal


@pytest.mark.parametrize("options", [{"beta": 0.1}, {"top_entropy_quantile": 0.5}], ids=str)
def test_rows_without_advantage_stay_if_they_change_the_loss(options: dict[str, Any]):
    groups = [scored([5], [completion([6]), completion([7]), completion([8])], [0.5, 0.5, None])]
    batch = _grpo(**options).make_batch(groups)
    assert batch.token_ids_BS.tolist() == [[5, 6], [5, 7]]
    assert not batch.has_signal


def test_truncated_completions_can_be_left_out_of_the_loss():
    groups = [scored([5], [completion([6, 7], finish="length"), completion([8])], [1.0, 0.0])]
    batch = _grpo(mask_truncated_completions=True).make_batch(groups)
    assert batch.token_ids_BS.tolist() == [[5, 8]]
    assert batch.token_total == 1


def test_batch_without_any_reward_has_one_row_and_no_signal():
    batch = _grpo().make_batch([scored([5], [completion([6]), completion([7])], [None, None])])
    assert batch.mask_BT.tolist() == [[0.0]]
    assert not batch.has_signal
