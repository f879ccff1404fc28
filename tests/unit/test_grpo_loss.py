"""The loss and the advantages equal TRL's values, and parts of a step add up to the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.rollouts import completion, scored
from tandem_trainer.algorithms.grpo import Grpo, advantages, policy_loss
from tandem_trainer.config import GrpoConfig

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl-1.16-losses.json").read_text())


def _implemented(case: dict[str, Any]) -> bool:
    try:
        GrpoConfig.model_validate({"loss_type": case["loss_type"], **case["options"]})
    except ValueError:
        return False
    return True


CASES = [case for case in GOLDEN["cases"] if _implemented(case)]


def _inputs() -> dict[str, torch.Tensor]:
    names = ("logps", "old_logps", "ref_logps", "sampler_logps", "mask", "entropy", "advantages")
    return {name: torch.tensor(GOLDEN["inputs"][name], dtype=torch.float64) for name in names}


def _loss(case: dict[str, Any], **changes: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    inputs = _inputs() | changes
    logps = inputs.pop("logps").requires_grad_()
    loss, metrics = policy_loss(
        logps,
        inputs.pop("old_logps"),
        inputs.pop("advantages"),
        inputs.pop("mask"),
        options={"loss_type": case["loss_type"], **case["options"]},
        max_completion_length=GOLDEN["inputs"]["max_completion_length"],
        **inputs,
    )
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss, gradient, metrics


def test_goldens_of_every_implemented_option_are_there():
    assert {case["loss_type"] for case in CASES} == {"grpo", "dapo"}
    assert {"beta", "epsilon_high", "importance_sampling", "clip_max"} <= {o for case in CASES for o in case["options"]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['loss_type']}-{case['options']}")
def test_loss_and_gradient_equal_trl(case: dict[str, Any]):
    loss, gradient, _ = _loss(case)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-9)
    torch.testing.assert_close(gradient, torch.tensor(case["grad_logps"], dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_rows_on_their_own_add_up_to_the_whole(loss_type: str):
    options = {"loss_type": loss_type, "beta": 0.04, "importance_sampling": "token_truncate"}
    inputs = _inputs()
    whole, _ = policy_loss(options=options, **inputs)
    parts = [
        policy_loss(options=options, token_total=5, row_total=2, **{k: v[i : i + 1] for k, v in inputs.items()})[0]
        for i in range(2)
    ]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), abs=1e-12)


def test_kl_sampler_is_the_k3_estimate_over_the_tokens_in_the_mask():
    inputs = _inputs()
    _, metrics = policy_loss(options={"loss_type": "dapo"}, **inputs)
    log_ratio = (inputs["logps"] - inputs["sampler_logps"])[inputs["mask"].bool()]
    assert metrics["kl_sampler"].item() == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), abs=1e-12)
    assert metrics["entropy"].item() == pytest.approx((0.1 + 1.5 + 0.7 + 0.2 + 2.0) / 5, abs=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl(scale: Any):
    golden = GOLDEN["advantages"]
    rewards = torch.tensor([float("nan") if r is None else r for r in golden["rewards"]], dtype=torch.float64)
    got = advantages(rewards.view(-1, golden["group_size"]), scale)
    # TRL computes them in float32.
    expected = torch.tensor(golden[f"scale_{scale}"], dtype=torch.float64)
    torch.testing.assert_close(got.flatten(), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_and_lone_rewards_give_no_advantage(scale: Any):
    nan = float("nan")
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.7, nan, nan], [nan, nan, nan]], dtype=torch.float64)
    assert advantages(rewards, scale).tolist() == [[0.0] * 3] * 3


def test_batch_leaves_out_what_has_no_gradient_and_still_counts_it():
    groups = [
        scored([5], [completion([6, 7]), completion([8])], [1.0, 0.0]),
        scored([5], [completion([6, 7, 8]), completion([9, 9, 9, 9])], [0.5, 0.5]),
        scored([5], [completion([6]), completion([7])], [None, None]),
    ]
    batch = Grpo(GrpoConfig(scale_rewards="none")).make_batch(groups)
    assert batch.advantages_B.tolist() == [0.5, -0.5]
    assert batch.token_ids_BS.tolist() == [[5, 6, 7], [5, 8, 0]]
    assert (batch.row_total, batch.token_total) == (4, 10)
    assert batch.has_signal


def test_with_a_reference_every_rewarded_row_is_trained_on():
    groups = [scored([5], [completion([6]), completion([7]), completion([8])], [0.5, 0.5, None])]
    batch = Grpo(GrpoConfig(beta=0.1)).make_batch(groups)
    assert batch.token_ids_BS.tolist() == [[5, 6], [5, 7]]
    assert not batch.has_signal


def test_truncated_completions_can_be_left_out_of_the_loss():
    groups = [scored([5], [completion([6, 7], finish="length"), completion([8])], [1.0, 0.0])]
    batch = Grpo(GrpoConfig(mask_truncated_completions=True)).make_batch(groups)
    assert batch.token_ids_BS.tolist() == [[5, 8]]
    assert batch.token_total == 1


def test_without_any_reward_a_batch_has_one_row_and_no_signal():
    batch = Grpo(GrpoConfig()).make_batch([scored([5], [completion([6]), completion([7])], [None, None])])
    assert batch.mask_BT.tolist() == [[0.0]]
    assert not batch.has_signal
