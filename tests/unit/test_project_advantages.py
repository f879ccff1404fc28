"""An advantage of the project is called once per group, with the trajectories that have a reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.project_code import write_module
from support.rollouts import completion, scored, single_turn
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.errors import UserError
from tandem_rollout.trajectory import Group
from tandem_trainer import algorithms

CPU = torch.device("cpu")
ADVANTAGES = """
    import torch

    def leave_one_out(rewards_G):
        others_G = (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1)
        return rewards_G - others_G

    def as_grpo(rewards_G):
        return (rewards_G - rewards_G.mean()) / (rewards_G.std() + 1e-4)

    def over_the_batch(rewards_G, batch_rewards_N, scale):
        return (rewards_G - rewards_G.mean()) * scale / batch_rewards_N.max()

    def short_first(rewards_G, trajectories):
        assert len(rewards_G) == len(trajectories)
        return [reward / one.num_sampled for reward, one in zip(rewards_G.tolist(), trajectories)]

    def of_one(rewards_G):
        return rewards_G.sort().values.sort().values * 2
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return write_module(tmp_path, monkeypatch, ADVANTAGES)


def _config(function: str | None, arguments: dict[str, Any] | None = None, **trainer: Any) -> TrainerConfig:
    grpo = {"advantage": function, "advantage_arguments": arguments or {}}
    return TrainerConfig.model_validate(
        {"max_steps": 9, "rewards": [{"function": "rewards:r"}], "grpo": grpo} | trainer
    )


COMPLETIONS = [completion([6, 7]), completion([9, 2, 3, 4]), completion([10]), completion([14])]


def _groups() -> list[Group]:
    return [
        scored([4], COMPLETIONS, [1.0, 4.0, None, 1.0]),
        scored([5], COMPLETIONS, [None] * 4, row=1),
        scored([5], COMPLETIONS, [8.0, 0.0, 1.0, 3.0], row=2),
    ]


def _advantages(config: TrainerConfig, groups: list[Group], others: list[float] | None = None) -> list[float]:
    batch = algorithms.load(config, CPU).make_batch(groups, lambda values: values + (others or []))
    return [round(advantage, 4) for advantage in batch.advantages_B.tolist()]


def test_it_gets_the_rewards_that_exist_in_the_order_of_the_trajectories(module: str) -> None:
    assert _advantages(_config(f"{module}:leave_one_out"), _groups()) == [-1.5, 3.0, -1.5, 6.6667, -4.0, -2.6667]
    assert _advantages(_config(f"{module}:short_first"), _groups()) == [0.5, 1.0, 1.0, 4.0, 1.0, 3.0]


def test_the_users_formula_of_grpo_gives_its_advantages(module: str) -> None:
    groups = [_groups()[2]]
    assert _advantages(_config(f"{module}:as_grpo"), groups) == _advantages(_config(None), groups)


def test_it_gets_the_rewards_of_all_ranks_and_its_arguments(module: str) -> None:
    config = _config(f"{module}:over_the_batch", {"scale": 10.0})
    assert _advantages(config, [_groups()[2]]) == [6.25, -3.75, -2.5]  # 0 for the reward 3, which is the mean
    assert _advantages(config, [_groups()[2]], others=[80.0]) == [0.625, -0.375, -0.25]


def test_a_group_of_one_trajectory_is_possible(module: str) -> None:
    config = _config(f"{module}:of_one", rollout={"num_generations": 1})
    groups = [Group(row=0, trajectories=(single_turn([4], completion([5]), 1.5),))]
    assert _advantages(config, groups) == [3.0]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def advantage(rewards_G): return rewards_G.mean()", r"returned a tensor of shape \[\] .*expected 8 finite"),
        ("def advantage(rewards_G): return rewards_G[1:]", r"a tensor of shape \[7\] .*one per trajectory"),
        ("def advantage(rewards_G): return rewards_G / 0", r"returned \[inf, .*expected 8 finite numbers"),
        ("def advantage(rewards_G): return None", "returned NoneType .*expected 8 finite numbers"),
        ("def advantage(rewards_G): return ['x'] * 8", "returned a list of 8 .*expected 8 finite numbers"),
        ("def advantage(rewards_G): return rewards_G.foo", "AttributeError: .*Fix: correct the function"),
        (
            "def advantage(rewards): return rewards",
            "required argument: 'rewards'. It may take rewards_G, batch_rewards_N",
        ),
        ("advantage = 3", "has no function 'advantage'"),
    ],
)
def test_a_wrong_advantage_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    name = write_module(tmp_path, monkeypatch, code)
    with pytest.raises(UserError, match=rf"advantage {name}:advantage.*{message}"):
        algorithms.load(_config(f"{name}:advantage"), CPU)
