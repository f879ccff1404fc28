"""Online DPO: pairs, loss and gradient equal TRL's, and splitting into micro-batches keeps pairs together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.rollouts import completion, scored
from tandem_protocol.config.trainer import TrainerConfig
from tandem_trainer import algorithms
from tandem_trainer.algorithms.base import MicroBatchLoss, StepTotals
from tandem_trainer.algorithms.online_dpo import OnlineDpo
from tandem_trainer.batch import Batch

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl-1.16-online-dpo.json").read_text())
PAIRS = len(GOLDEN["inputs"]["rewards"]) // 2


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "max_steps": 1,
        "algorithm": "online_dpo",
        "rewards": [{"function": "rewards:r"}],
        "rollout": {"num_generations": 2},
    } | changes


def _dpo(**options: Any) -> OnlineDpo:
    algorithm = algorithms.build(TrainerConfig.model_validate(_config(online_dpo=options)))
    assert isinstance(algorithm, OnlineDpo)
    return algorithm


def _golden_batch(algorithm: OnlineDpo) -> Batch:
    """In the golden file, row i consists of the token 10 + i."""
    inputs = GOLDEN["inputs"]
    rows = [
        completion([10 + i] * sum(mask), finish="stop" if 2 in ids else "length")
        for i, (mask, ids) in enumerate(zip(inputs["mask"], inputs["token_ids"], strict=True))
    ]
    rewards = inputs["rewards"]
    groups = [scored([5], [rows[p], rows[p + PAIRS]], [rewards[p], rewards[p + PAIRS]]) for p in range(PAIRS)]
    return algorithm.make_batch(groups)


def _loss(algorithm: OnlineDpo, batch: Batch, logps: Tensor, ref_logps: Tensor) -> MicroBatchLoss:
    totals = StepTotals(batch.trajectory_total, batch.token_total)
    return algorithm.loss(
        logps,
        batch,
        totals,
        entropy_BT=torch.zeros_like(logps),
        old_logprobs_BT=logps.detach(),
        ref_logprobs_BT=ref_logps,
    )


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["options"]))
def test_loss_gradient_and_metrics_equal_trl(case: dict[str, Any]):
    algorithm = _dpo(**case["options"])
    batch = _golden_batch(algorithm)
    order = batch.token_ids_BS[:, 1] - 10
    logps, ref_logps = (torch.tensor(GOLDEN["inputs"][n], dtype=torch.float64) for n in ("logps", "ref_logps"))
    logps.requires_grad_()
    share = _loss(algorithm, batch, logps[order], ref_logps[order])
    (gradient,) = torch.autograd.grad(share.loss, logps)
    assert share.loss.item() == pytest.approx(case["loss"], abs=1e-9)
    torch.testing.assert_close(gradient, torch.tensor(case["grad_logps"], dtype=torch.float64), atol=1e-9, rtol=0)
    got = {name: share.metrics[name].value.item() for name in case["metrics"]}
    assert got == pytest.approx(case["metrics"], abs=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("max_tokens", [1, 30])
def test_pairs_stay_together_and_their_losses_add_up(loss_type: str, max_tokens: int):
    algorithm = _dpo(loss_type=loss_type)
    batch = _golden_batch(algorithm)
    torch.manual_seed(0)
    logps, ref_logps = torch.randn(2, *batch.mask_BT.shape, dtype=torch.float64)
    by_token = {int(ids[1]): row for row, ids in enumerate(batch.token_ids_BS)}
    unsplit = _loss(algorithm, batch, logps, ref_logps).loss
    parts = []
    for micro_batch in batch.micro_batches(max_tokens):
        assert micro_batch.advantages_B.tolist() == [1.0, -1.0] * (len(micro_batch.advantages_B) // 2)
        rows = [by_token[int(ids[1])] for ids in micro_batch.token_ids_BS]
        width = micro_batch.mask_BT.shape[1]
        parts.append(_loss(algorithm, micro_batch, logps[rows, :width], ref_logps[rows, :width]).loss)
    assert len(parts) == PAIRS if max_tokens == 1 else len(parts) < PAIRS
    torch.testing.assert_close(torch.stack(parts).sum(), unsplit)


def test_ties_and_missing_rewards_prefer_nothing():
    pair = [completion([6]), completion([7])]
    groups = [scored([5], pair, rewards) for rewards in ([1.0, 1.0], [None, 1.0], [0.0, 2.0])]
    batch = _dpo().make_batch(groups)
    assert batch.token_ids_BS.tolist() == [[5, 7], [5, 6]]
    assert (batch.trajectory_total, batch.token_total, batch.has_signal) == (1, 2, True)


def test_rank_without_a_pair_does_not_change_the_step():
    algorithm = _dpo()
    batch = algorithm.make_batch([scored([5], [completion([6]), completion([7])], [1.0, 1.0])])
    assert not batch.has_signal
    assert (batch.trajectory_total, batch.token_total) == (0, 0)
    logps = torch.randn(batch.mask_BT.shape, requires_grad=True)
    share = _loss(algorithm, batch, logps, torch.zeros_like(logps))
    (gradient,) = torch.autograd.grad(share.loss, logps)
    assert share.loss.item() == 0.0
    assert not gradient.any()
    assert {mean.weight.item() for mean in share.metrics.values()} == {0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"num_generations": 8}}, r"num_generations is 8, expected 2: online_dpo compares two completions"),
        ({"online_dpo": {"judge": "judge:prefer"}}, "expected only one of them"),
        ({"rewards": []}, "rewards is empty, expected at least one, online_dpo.judge"),
        (
            {"algorithm": "grpo", "online_dpo": {"judge": "j:f"}, "rewards": []},
            "algorithm is grpo, expected online_dpo",
        ),
        ({"online_dpo": {"judge": "prefer"}}, "String should match pattern"),
    ],
)
def test_configuration_without_pairs_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TrainerConfig.model_validate(_config(**changes))
