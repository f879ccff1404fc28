"""Losses and gradients equal TRL's for every option, and the losses of micro-batches add up to that of the step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem_protocol.config.learning import GrpoConfig
from tandem_trainer.algorithms.base import StepTotals
from tandem_trainer.algorithms.corrections import entropy_quantile
from tandem_trainer.algorithms.grpo import policy_loss
from tandem_trainer.algorithms.objectives import LOSS_TYPES
from tandem_trainer.algorithms.tokens import Tokens

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((GOLDEN_DIR / "trl-1.16-losses.json").read_text())
RANDOM = json.loads((GOLDEN_DIR / "trl-1.16-losses-random.json").read_text())
EXACT: dict[str, Any] = {"atol": 1e-9, "rtol": 0}

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Loss, its gradient, and the metrics."""


def _tensors(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {n: torch.tensor(v, dtype=torch.float64) for n, v in inputs.items() if n != "max_completion_length"}


def _inputs() -> dict[str, Tensor]:
    return _tensors(GOLDEN["inputs"])


def _policy_loss(options: dict[str, Any], inputs: Mapping[str, Any], **totals: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Call `policy_loss` with tensors that have TRL's names. The totals are those of the tensors, unless given."""
    tokens = Tokens(
        logprobs_BT=inputs["logps"],
        old_logprobs_BT=inputs["old_logps"],
        advantages_BT=inputs["advantages"][:, None],
        mask_BT=inputs["mask"],
        ref_logprobs_BT=inputs["ref_logps"],
        sampler_logprobs_BT=inputs["sampler_logps"],
        entropy_BT=inputs["entropy"],
    )
    of_these = {"trajectories": len(inputs["mask"]), "tokens": int(inputs["mask"].sum()), "max_completion_length": 4}
    config = GrpoConfig.model_validate({"importance_sampling": "none", **options})
    return policy_loss(tokens, StepTotals(**of_these | totals), config)


def _loss(options: dict[str, Any], inputs: dict[str, Tensor], **totals: Any) -> Loss:
    logps = inputs["logps"].clone().requires_grad_()
    loss, metrics = _policy_loss(options, inputs | {"logps": logps}, **totals)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss, gradient, metrics


def _assert_equals_trl(case: dict[str, Any], inputs: dict[str, Tensor], max_completion_length: int) -> None:
    options = {"loss_type": case["loss_type"], **case["options"]}
    loss, gradient, _ = _loss(options, inputs, max_completion_length=max_completion_length)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-9)
    torch.testing.assert_close(gradient, torch.tensor(case["grad_logps"], dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['loss_type']}-{case['options']}")
def test_loss_and_gradient_equal_trl(case: dict[str, Any]):
    _assert_equals_trl(case, _inputs(), GOLDEN["inputs"]["max_completion_length"])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_equal_trl_for_random_options_and_inputs(loss_type: str):
    inputs = [_tensors(one) for one in RANDOM["inputs"]]
    cases = [case for case in RANDOM["cases"] if case["loss_type"] == loss_type]
    assert len(cases) > 15
    for case in cases:
        _assert_equals_trl(case, inputs[case["input"]], RANDOM["max_completion_length"])


@pytest.mark.parametrize("options", [{}, {"level": "sequence"}, {"top_entropy_quantile": 0.4}], ids=str)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_of_single_rows_add_up_to_the_loss_of_the_batch(loss_type: str, options: dict[str, Any]):
    options = {"loss_type": loss_type, "beta": 0.04, "importance_sampling": "token_truncate", **options}
    inputs = _tensors(RANDOM["inputs"][1])
    mask = inputs["mask"].bool()
    step: dict[str, Any] = {"tokens": int(mask.sum()), "trajectories": len(mask)}
    step["entropy_threshold"] = entropy_quantile(inputs["entropy"][mask], 0.6)
    unsplit, gradient, _ = _loss(options, inputs)
    parts = [_loss(options, {n: v[i : i + 1] for n, v in inputs.items()}, **step) for i in range(len(mask))]
    torch.testing.assert_close(torch.stack([loss for loss, _, _ in parts]).sum(), unsplit)
    torch.testing.assert_close(torch.cat([gradient for _, gradient, _ in parts]), gradient)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_values_in_the_padding_do_not_change_the_loss(loss_type: str):
    options = {"loss_type": loss_type, "beta": 0.04, "off_policy_mask": 0.05, "top_entropy_quantile": 0.5}
    inputs = _inputs()
    padding = inputs["mask"] == 0
    noise = {n: torch.where(padding, 0.7, v) for n, v in inputs.items() if v.shape == padding.shape and n != "mask"}
    loss, gradient, metrics = _loss(options, inputs)
    other_loss, other_gradient, other_metrics = _loss(options, inputs | noise)
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_gradient, gradient)
    torch.testing.assert_close(other_metrics, metrics)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo"])
def test_without_drift_all_clipped_losses_are_reinforce(loss_type: str):
    inputs = _inputs()
    _, gradient, metrics = _loss({"loss_type": loss_type}, inputs | {"old_logps": inputs["logps"]})
    weight = {"grpo": [[1 / 6], [1 / 4]], "dapo": [[1 / 5]], "dr_grpo": [[1 / 8]], "luspo": [[1 / 2]]}[loss_type]
    expected = -inputs["advantages"][:, None] * torch.tensor(weight, dtype=torch.float64) * inputs["mask"]
    torch.testing.assert_close(gradient, expected)
    assert metrics["clip_ratio/region_mean"] == 0


def test_metrics_are_means_over_the_tokens_in_the_mask_and_maxima():
    inputs = _inputs()
    _, _, metrics = _loss({"loss_type": "dapo", "importance_sampling": "token_truncate", "epsilon": 0.15}, inputs)
    log_ratio = (inputs["logps"] - inputs["sampler_logps"])[inputs["mask"].bool()]
    correction = (inputs["old_logps"] - inputs["sampler_logps"])[inputs["mask"].bool()].exp()
    expected = {
        "kl_sampler": (log_ratio.exp() - 1 - log_ratio).mean().item(),
        "entropy": (0.1 + 1.5 + 0.7 + 0.2 + 2.0) / 5,
        "sampling/importance_sampling_ratio/mean": correction.mean().item(),
        "sampling/importance_sampling_ratio/max": correction.max().item(),
        "clip_ratio/low_mean": 0.0,
        "clip_ratio/high_mean": 1 / 5,
        "clip_ratio/region_mean": 1 / 5,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"beta": 0.1}, "ref_logprobs_BT"),
        ({"importance_sampling": "token_mask"}, "sampler_logprobs_BT"),
        ({"top_entropy_quantile": 0.5}, "entropy_BT"),
    ],
)
def test_missing_tensor_is_named(options: dict[str, Any], missing: str):
    inputs = _inputs() | {missing.removesuffix("_BT").replace("logprobs", "logps"): None}
    with pytest.raises(ValueError, match=f"got no {missing}, expected"):
        _policy_loss(options, inputs)


def test_missing_length_is_named():
    with pytest.raises(ValueError, match="got no max_completion_length, expected"):
        _policy_loss({"loss_type": "dr_grpo"}, _inputs(), max_completion_length=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "vespo", "importance_sampling": "sequence_mask"}, "expected none, token_truncate or token_mask"),
        ({"clip_min": 3.0, "clip_max": 2.0}, "clip_min is 3.0, expected less than clip_max, which is 2.0"),
        ({"importance_sampling": "token_truncate", "clip_max": None}, "without clip_max and clip_min"),
    ],
)
def test_incompatible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        GrpoConfig.model_validate(options)
