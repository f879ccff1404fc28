"""Whether the logprobs of a row are its own: the same alone and padded beside a longer one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import UserError
from .logprobs import TokenLogprobs

SHORT, LONG = 8, 16
"""Tokens of the two rows."""


@torch.no_grad()
def check_causal(policy: TokenLogprobs) -> None:
    """Compare a short row alone with the same row beside a longer one.

    Raises:
        UserError: they differ, because tokens attend to later ones, as an encoder's do.
    """
    model = policy.model
    long_S = torch.arange(LONG, device=model.device) % model.get_input_embeddings().num_embeddings
    alone_T = _logprobs(policy, long_S[None, :SHORT])[0]
    padded_BS = torch.stack([torch.where(torch.arange(LONG, device=model.device) < SHORT, long_S, 0), long_S])
    beside_T = _logprobs(policy, padded_BS)[0, : SHORT - 1]
    if not torch.allclose(alone_T, beside_T, atol=1e-4):
        raise UserError(
            f"{type(model).__name__} gives the same tokens the logprobs {alone_T[:3].tolist()} alone and "
            f"{beside_T[:3].tolist()} with padding behind them, expected equal ones. Its tokens attend to later ones, "
            f"or to padding{_hint(model)}. Fix: choose a causal language model."
        )


def _logprobs(policy: TokenLogprobs, token_ids_BS: Tensor) -> Tensor:
    """[B, S − 1]"""
    ones_B = torch.ones(len(token_ids_BS), dtype=torch.long, device=token_ids_BS.device)
    logprobs_BT, _ = policy(token_ids_BS, ones_B, torch.ones_like(token_ids_BS[:, 1:]).bool())
    return logprobs_BT  # type: ignore[no-any-return]  # a module answers with anything


def _hint(model: PreTrainedModel) -> str:
    is_encoder = getattr(model.config, "is_decoder", None) is False
    return " (config.json has is_decoder: false)" if is_encoder else ""
