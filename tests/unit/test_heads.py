"""Logprobs of scaled or capped logits, which are computed in chunks, have the right value and gradient."""

from __future__ import annotations

import pytest
import torch

from support.architectures import VOCAB, tiny_config, tiny_model
from tandem_trainer.learner import logprobs
from tandem_trainer.learner.heads import Head
from tandem_trainer.learner.logprobs import TokenLogprobs

TOKENS_BS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
PROMPTS_B = torch.tensor([2, 3])
PRESENT_BT = torch.ones(2, 9).bool()
WEIGHTS_BT = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("llama", Head(1.0, None)),
        ("gemma2", Head(1.0, 5.0)),
        ("gemma3n_text", Head(1.0, 30.0)),
        ("cohere", Head(0.7, None)),
        ("cohere2", Head(0.7, None)),
        ("granite", Head(0.5, None)),
        ("hyperclovax", Head(2.0, None)),
        ("falcon_h1", Head(0.5, None)),
        ("minicpm3", Head(0.5, None)),
        ("recurrent_gemma", Head(1.0, 30.0)),
    ],
)
def test_scale_and_cap_are_read_from_the_configuration(family: str, head: Head) -> None:
    assert Head.of(tiny_config(family)) == head


@pytest.mark.parametrize("chunk_size", [4, 1000])
@pytest.mark.parametrize("block", [1, 1000])
@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_value_and_gradient_equal_those_of_the_models_logits(
    monkeypatch: pytest.MonkeyPatch, family: str, block: int, chunk_size: int
) -> None:
    monkeypatch.setattr(logprobs, "softmax_logits", lambda _device: block)
    model = tiny_model(tiny_config(family))
    policy = TokenLogprobs(model, temperature=0.7, chunk_size=chunk_size)
    logits_BSV = model(input_ids=TOKENS_BS, use_cache=False).logits / 0.7
    rows_B1, positions_BT = torch.arange(2)[:, None], PROMPTS_B[:, None] + torch.arange(9)
    logprobs_BTV = logits_BSV[rows_B1, positions_BT - 1].log_softmax(-1)
    expected_BT = logprobs_BTV.gather(-1, TOKENS_BS[rows_B1, positions_BT][..., None]).squeeze(-1)
    expected = torch.autograd.grad((expected_BT * WEIGHTS_BT).sum(), list(model.parameters()))

    logprobs_BT, entropy_BT = policy(TOKENS_BS, PROMPTS_B, PRESENT_BT)
    got = torch.autograd.grad((logprobs_BT * WEIGHTS_BT).sum(), list(model.parameters()))

    torch.testing.assert_close(logprobs_BT, expected_BT, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy_BT, -(logprobs_BTV.exp() * logprobs_BTV).sum(-1), atol=1e-5, rtol=0)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_the_gradient_of_capped_logits_is_right_where_a_probability_is_almost_zero() -> None:
    logits_CV = torch.tensor([[300.0, -300.0, 0.0, 80.0]], requires_grad=True)
    targets_C = torch.tensor([1])
    expected_C = (30 * torch.tanh(logits_CV.double() / 30)).log_softmax(-1)[:, 1]
    (expected_CV,) = torch.autograd.grad(expected_C.sum(), logits_CV)
    got_C, _ = logprobs._TargetLogprobs.apply(logits_CV.clone(), targets_C, 1.0, 30.0)
    (got_CV,) = torch.autograd.grad(got_C.sum(), logits_CV)
    torch.testing.assert_close(got_C, expected_C.float())
    torch.testing.assert_close(got_CV, expected_CV, atol=1e-6, rtol=1e-4)
