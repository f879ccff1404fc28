"""Check that attention is causal: a row has the same logprobs alone as in a batch, padded to a longer row."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tandem_rollout.errors import UserError

from .logprobs import TokenLogprobs

SHORT, LONG = 8, 16
"""Lengths of the two rows in tokens."""


@torch.no_grad()
def check_causal(policy: TokenLogprobs) -> None:
    """Compare the logprobs of a short row alone with those of the same row in a batch with a longer one.

    Raises:
        UserError: they differ. Tokens attend to later tokens, as in an encoder, or to padding.
    """
    model = policy.model
    long_S = torch.arange(LONG, device=model.device) % model.get_input_embeddings().num_embeddings
    alone_T = _logprobs(policy, long_S[None, :SHORT])[0]
    padded_BS = torch.stack([torch.where(torch.arange(LONG, device=model.device) < SHORT, long_S, 0), long_S])
    beside_T = _logprobs(policy, padded_BS)[0, : SHORT - 1]
    if not torch.allclose(alone_T, beside_T, atol=1e-4):
        raise UserError(
            f"{type(model).__name__} computes the logprobs {alone_T[:3].tolist()} for some tokens alone and "
            f"{beside_T[:3].tolist()} for the same tokens followed by padding, expected equal ones. Its tokens attend "
            f"to later tokens or to padding{_hint(model)}. Fix: choose a causal language model."
        )


def _logprobs(policy: TokenLogprobs, token_ids_BS: Tensor) -> Tensor:
    """[B, S − 1]. Return the logprobs of all tokens but the first."""
    ones_B = torch.ones(len(token_ids_BS), dtype=torch.long, device=token_ids_BS.device)
    logprobs_BT, _ = policy(token_ids_BS, ones_B, torch.ones_like(token_ids_BS[:, 1:]).bool())
    return logprobs_BT  # type: ignore[no-any-return]  # calling a module returns Any


def _hint(model: PreTrainedModel) -> str:
    is_encoder = getattr(model.config, "is_decoder", None) is False
    return " (config.json has is_decoder: false)" if is_encoder else ""
