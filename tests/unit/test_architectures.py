"""For every causal language model in transformers: logprobs do not depend on padding or on whether rows share a prompt.

They equal those of the model's logits.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from support.architectures import TEXT_FAMILIES, VOCAB, tiny_config, tiny_model
from tandem_rollout.errors import UserError
from tandem_trainer.batch import SharedPrompts
from tandem_trainer.learner.causality import check_causal
from tandem_trainer.learner.logprobs import TokenLogprobs, check_logprobs
from tandem_trainer.learner.shared_prompts import difference_when_shared

TEMPERATURE, PROMPT = 0.7, 2
ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
REFUSED = dict.fromkeys(ENCODERS, "attend to later tokens|changes its logits after the output embedding") | {
    "llama4_text": "separate output embedding",
    "inkling_text": "changes its logits after the output embedding",
    "modernbert-decoder": "changes its logits after the output embedding",
    "prophetnet": "changes its logits after the output embedding",
}
UNSHARED = (
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba",
    "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "openai-gpt", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
    "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm", "zamba2", "zaya",
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
    "deepseek_v4", "hy_v4",
)  # fmt: skip
"""Families that compute the prompt with each row: with recurrent layers, without a cache, or with one of their own; the
decoders of encoder-decoder models; and those that compress keys."""
LATENT = ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu")
"""Families with multi-head latent attention, in which each head has keys and values of its own."""
SPARSE = ("axk2", "deepseek_v32", "glm_moe_dsa")
"""Families that are not tested: in rows longer than `index_topk`, transformers 5.19 also chooses keys among later
tokens. All of them use multi-head latent attention, which the generator refuses."""


@pytest.mark.parametrize("family", [family for family in TEXT_FAMILIES if family not in SPARSE])
def test_logprobs_of_a_row_do_not_depend_on_padding_and_equal_those_of_the_models_logits(family: str) -> None:
    changes = {"num_key_value_heads": 2} if family in LATENT else {}
    model = tiny_model(tiny_config(family, **changes)).eval()
    policy = TokenLogprobs(model, temperature=TEMPERATURE, chunk_size=16)
    if family in REFUSED:
        with pytest.raises(UserError, match=REFUSED[family]):
            _check(policy)
        return
    _check(policy)
    short_S, long_S = _tokens(40), _tokens(200)
    with torch.no_grad():
        alone_T = _logprobs(policy, short_S)[0]
        padded_T = _logprobs(policy, short_S, long_S)[0, : len(short_S) - PROMPT]
    torch.testing.assert_close(padded_T, alone_T, atol=1e-4, rtol=0)
    torch.testing.assert_close(alone_T, _own(model, short_S), atol=1e-4, rtol=0)
    assert (difference_when_shared(policy) is None) == (family not in UNSHARED)
    if family not in UNSHARED:
        torch.testing.assert_close(
            _from_a_shared_prompt(policy, long_S, 30), _own(model, long_S)[28:], atol=1e-4, rtol=0
        )


@torch.no_grad()
def _from_a_shared_prompt(policy: TokenLogprobs, tokens_S: Tensor, prompt: int) -> Tensor:
    """Logprobs behind the prompt, of the second of two rows with the same prompt."""
    token_ids_BS = torch.stack([tokens_S, tokens_S])
    token_ids_BS[0, prompt:] = 3
    shared = SharedPrompts(tokens_S[None, :prompt], torch.tensor([0, 0]), is_first=True, is_last=True)
    starts_B = torch.full((2,), prompt)
    logprobs_BT, _ = policy(token_ids_BS, starts_B, torch.ones_like(token_ids_BS[:, prompt:]).bool(), shared)
    return logprobs_BT[1]


def _check(policy: TokenLogprobs) -> None:
    check_logprobs(policy)
    check_causal(policy)


def _tokens(number: int) -> Tensor:
    return torch.randint(3, VOCAB, (number,), generator=torch.Generator().manual_seed(number))


def _logprobs(policy: TokenLogprobs, *rows: Tensor) -> Tensor:
    """Logprobs of the rows' completions: [B, T]."""
    lengths_B = torch.tensor([len(row) for row in rows])
    token_ids_BS = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    completion_mask_BT = torch.arange(token_ids_BS.shape[1] - PROMPT) < (lengths_B - PROMPT)[:, None]
    return policy(token_ids_BS, torch.full_like(lengths_B, PROMPT), completion_mask_BT)[0]


@torch.no_grad()
def _own(model: PreTrainedModel, tokens_S: Tensor) -> Tensor:
    logits_SV = model(input_ids=tokens_S[None], use_cache=False).logits[0].float() / TEMPERATURE
    return logits_SV.log_softmax(-1)[PROMPT - 1 : -1].gather(-1, tokens_S[PROMPT:, None])[:, 0]
