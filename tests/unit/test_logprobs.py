"""Chunked logprobs have the values and gradients of full logits, but need less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from support.architectures import tiny_config, tiny_model
from support.models import make_tiny_model
from tandem_rollout.errors import UserError
from tandem_trainer.learner import logprobs
from tandem_trainer.learner.heads import Head
from tandem_trainer.learner.logprobs import TokenLogprobs, check_logprobs

TOKENS_BS = torch.tensor([[4, 5, 6, 7, 8, 0], [9, 10, 11, 12, 13, 14]])
PROMPTS_B = torch.tensor([2, 3])
PRESENT_BT = torch.tensor([[True, True, True], [True, True, True]])


def _expected(model: LlamaForCausalLM, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies computed from full logits, one unpadded row at a time."""
    rows, entropies = [], []
    for tokens_S, prompt in zip(TOKENS_BS, PROMPTS_B.tolist(), strict=True):
        real_S = tokens_S[: prompt + 3]
        logprobs_SV = (model(input_ids=real_S[None]).logits[0] / temperature).log_softmax(-1)
        rows.append(logprobs_SV[prompt - 1 : -1].gather(-1, real_S[prompt:, None]).squeeze(-1))
        entropies.append(-(logprobs_SV.exp() * logprobs_SV).sum(-1)[prompt - 1 : -1])
    return torch.stack(rows), torch.stack(entropies)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("block", [1, 1000])
def test_value_and_gradient_equal_the_full_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, chunk_size: int, block: int
):
    monkeypatch.setattr(logprobs, "softmax_logits", lambda _device: block)
    model = LlamaForCausalLM.from_pretrained(make_tiny_model(tmp_path, tied=tied)).double()
    policy = TokenLogprobs(model, temperature=0.7, chunk_size=chunk_size)
    weights_BT = torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.0, -1.0]])

    expected_BT, expected_entropy_BT = _expected(model, 0.7)
    expected = torch.autograd.grad((expected_BT * weights_BT).sum(), list(model.parameters()))
    logprobs_BT, entropy_BT = policy(TOKENS_BS, PROMPTS_B, PRESENT_BT)
    got = torch.autograd.grad((logprobs_BT * weights_BT).sum(), list(model.parameters()))

    torch.testing.assert_close(logprobs_BT, expected_BT.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy_BT, expected_entropy_BT.float(), atol=1e-6, rtol=0)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_logprobs_outside_of_the_completion_are_zero(tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(make_tiny_model(tmp_path))
    completion_mask_BT = torch.tensor([[True, False, False], [True, True, True]])
    logprobs_BT, entropy_BT = TokenLogprobs(model, temperature=1.0, chunk_size=2)(
        TOKENS_BS, PROMPTS_B, completion_mask_BT
    )
    assert logprobs_BT[0, 1:].tolist() == entropy_BT[0, 1:].tolist() == [0.0, 0.0]
    assert (logprobs_BT[completion_mask_BT] < 0).all()
    assert (entropy_BT[completion_mask_BT] > 0).all()


def test_logits_exist_for_at_most_one_chunk(tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(make_tiny_model(tmp_path))
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _input, output: seen.append(len(output)))
    logprobs_BT, _ = TokenLogprobs(model, temperature=1.0, chunk_size=4)(TOKENS_BS, PROMPTS_B, PRESENT_BT)
    logprobs_BT.sum().backward()
    assert seen == [4, 2, 4]  # forward pass; then the backward pass computes all chunks except the last again


def test_model_that_changes_its_logits_in_an_unknown_way_is_refused():
    policy = TokenLogprobs(tiny_model(tiny_config("gemma2")), temperature=1.0, chunk_size=4)
    check_logprobs(policy)
    policy.head = Head()  # as for a model whose soft cap has a name that heads.py does not know
    with pytest.raises(UserError, match="Gemma2ForCausalLM changes its logits after the output embedding"):
        check_logprobs(policy)
