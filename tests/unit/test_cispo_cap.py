"""CISPO needs a cap of its own: the default of the other losses would cap every ratio."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tandem_protocol.config.trainer import TrainerConfig

BASE: dict[str, Any] = {"max_steps": 1, "rewards": [{"function": "rewards:f"}]}


@pytest.mark.parametrize("epsilon_high", [None, 0.28, 0.99])
def test_a_cap_below_the_ratio_of_an_unchanged_policy_is_refused_with_the_fix(epsilon_high: float | None) -> None:
    grpo = {"loss_type": "cispo", "epsilon_high": epsilon_high}
    with pytest.raises(ValidationError, match=r"grpo\.epsilon_high is .* for loss_type cispo.*Fix: set grpo"):
        TrainerConfig.model_validate(BASE | {"grpo": grpo})


@pytest.mark.parametrize(
    "options",
    [
        {"grpo": {"loss_type": "cispo", "epsilon_high": 5.0}},
        {"grpo": {"loss_type": "cispo", "epsilon_high": 1.0}},
        {"grpo": {"loss_type": "dapo"}},
        {"algorithm": "online_dpo", "rollout": {"num_generations": 2}, "grpo": {"loss_type": "cispo"}},
    ],
)
def test_other_settings_are_accepted(options: dict[str, Any]) -> None:
    TrainerConfig.model_validate(BASE | options)
