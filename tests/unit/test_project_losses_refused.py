"""A wrong loss of the project is refused before the run, with the function's name and a fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.project_code import write_module
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.errors import UserError
from tandem_trainer import algorithms

CPU = torch.device("cpu")
MISTAKES: dict[str, tuple[str, str]] = {
    "mean": ("def loss(logprobs_BT): return logprobs_BT.mean()", r"a tensor of shape \[\], expected .*without a mean"),
    "a row too few": ("def loss(logprobs_BT): return logprobs_BT[1:]", r"expected a floating-point tensor of shape"),
    "one row": ("def loss(logprobs_BT): return logprobs_BT.sum(1)", r"expected a floating-point tensor of shape"),
    "nothing": ("def loss(logprobs_BT): pass", "returned NoneType, expected"),
    "three parts": ("def loss(logprobs_BT): return logprobs_BT, {}, 1", "returned a tuple of 3, expected"),
    "not numbers": ("def loss(advantages_BT): return advantages_BT > 0", "expected a floating-point tensor"),
    "asynchronous": ("async def loss(logprobs_BT): return logprobs_BT", "is asynchronous, expected a plain function"),
    "NaN": ("def loss(logprobs_BT): return logprobs_BT.log()", "expected finite numbers"),
    "infinite gradient": (
        "def loss(logprobs_BT, mask_BT): return (logprobs_BT * mask_BT).abs().sqrt()",
        "squared gradient nan .*expected finite numbers",
    ),
    "no gradient": ("def loss(logprobs_BT): return logprobs_BT.detach()", "has no gradient"),
    "only constants": ("def loss(advantages_BT, mask_BT): return advantages_BT * mask_BT", "has no gradient"),
    "raises": ("def loss(logprobs_BT): raise KeyError('x')", r"KeyError: 'x' \(.*py:\d+\). Fix: correct"),
    "exits": ("import sys\ndef loss(logprobs_BT): sys.exit('no')", "SystemExit: no"),
    "unknown parameter": ("def loss(logits): return logits", "missing a required argument: 'logits'. It may take logp"),
    "positional": ("def loss(logprobs_BT, /): return logprobs_BT", "cannot be called: .*logprobs_BT"),
    "a class": ("class loss: pass", "is a class, expected a function"),
    "absent": ("def other(): pass", "has no function 'loss', expected one of: other"),
    "broken module": ("1 / 0", "ZeroDivisionError"),
    "reference": (
        "def loss(tokens): return tokens.logprobs_BT - tokens.ref_logprobs_BT",
        "NoneType.*Fix: take ref_logprobs_BT as a parameter",
    ),
    "normalized over the micro-batch": (
        "def loss(logprobs_BT, advantages_BT): return -(advantages_BT - advantages_BT.mean()) * logprobs_BT",
        "for the sum of its rows, expected the same.*max_tokens_per_micro_batch",
    ),
    "divided by its own number of tokens": (
        "def loss(logprobs_BT, mask_BT): return logprobs_BT / mask_BT.sum()",
        "for the sum of its rows, expected the same",
    ),
    "divided by no tokens": (
        "def loss(logprobs_BT, mask_BT): return logprobs_BT / mask_BT.sum(1, True)",
        "for rows of which no token counts .* clamp",
    ),
    "metric of Tandem": ("def loss(logprobs_BT): return logprobs_BT, {'loss': 1}", "'loss', which metrics.jsonl has"),
    "metric of GRPO": ("def loss(logprobs_BT): return logprobs_BT, {'entropy': 1}", "'entropy', which metrics.jsonl"),
    "metric of a wrong shape": ("def loss(logprobs_BT): return logprobs_BT, {'m': logprobs_BT[:, :1, None]}", "'m'"),
    "metric that is text": ("def loss(logprobs_BT): return logprobs_BT, {'m': 'x'}", "returned str as its metric 'm'"),
    "metric without a name": ("def loss(logprobs_BT): return logprobs_BT, {1: 1.0}", "the name 1, expected text"),
}


def _config(**trainer: Any) -> TrainerConfig:
    return TrainerConfig.model_validate({"max_steps": 9, "rewards": [{"function": "rewards:r"}]} | trainer)


@pytest.mark.parametrize(("code", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_loss_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    name = write_module(tmp_path, monkeypatch, code)
    with pytest.raises(UserError, match=rf"(?s){name}.*{message}") as refused:
        algorithms.load(_config(grpo={"loss_type": f"{name}:loss"}), CPU)
    assert "Fix: " in str(refused.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def loss(logits_P): return logits_P.mean()", r"\[\], expected .*the loss of each pair"),
        ("def loss(logits_P): return (logits_P - logits_P.mean()) ** 2", "expected the same"),
        ("def loss(tokens): return tokens", "missing a required argument: 'tokens'. It may take chosen_P"),
    ],
)
def test_a_wrong_loss_over_pairs_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    name = write_module(tmp_path, monkeypatch, code)
    options = {"rollout": {"num_generations": 2}, "online_dpo": {"loss_type": f"{name}:loss"}}
    with pytest.raises(UserError, match=message):
        algorithms.load(_config(algorithm="online_dpo", **options), CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"logprobs_BT": 1}, "'logprobs_BT' has the name of something"), ({"wrong": 1}, "unexpected keyword .*'wrong'")],
)
def test_arguments_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    module = write_module(tmp_path, monkeypatch, "def clipped(logprobs_BT): return logprobs_BT")
    with pytest.raises(UserError, match=message):
        algorithms.load(_config(grpo={"loss_type": f"{module}:clipped", "loss_arguments": arguments}), CPU)


def test_a_loss_that_draws_random_numbers_is_accepted_and_leaves_those_of_the_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import torch\ndef loss(logprobs_BT): return logprobs_BT * torch.rand_like(logprobs_BT)"
    name = write_module(tmp_path, monkeypatch, code)
    before = torch.get_rng_state()
    algorithms.load(_config(grpo={"loss_type": f"{name}:loss"}), CPU)
    assert torch.equal(torch.get_rng_state(), before)
