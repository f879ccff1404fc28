"""Logprobs of sampled tokens without the logits of a whole batch.

Tensor names end in their shape: B rows, S prompt + completion tokens, T completion tokens, N completion tokens of all
rows together, C tokens of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .errors import UserError


class TokenLogprobs(nn.Module):
    """A causal language model that answers with the logprobs of given tokens instead of logits.

    A module, because accelerate's wrappers (DDP, FSDP) work through the `forward` of what they wrap.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float, chunk_size: int) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self._chunk_size = chunk_size

    def forward(self, token_ids_BS: Tensor, prompt_lengths_B: Tensor, present_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies of the completion tokens: [B, T] each, 0 where `present_BT` is False.

        At any time logits exist for `chunk_size` tokens only; the backward pass computes them again.
        """
        # No attention mask: padding stands on the right, where a causal model cannot see it.
        hidden_BSH = self.model.base_model(input_ids=token_ids_BS, use_cache=False).last_hidden_state
        rows_N, offsets_N = present_BT.nonzero(as_tuple=True)
        positions_N = prompt_lengths_B[rows_N] + offsets_N
        hidden_NH, targets_N = hidden_BSH[rows_N, positions_N - 1], token_ids_BS[rows_N, positions_N]
        chunks = [
            checkpoint(self._chunk, hidden_CH, targets_C, use_reentrant=False)
            for hidden_CH, targets_C in zip(
                torch.split(hidden_NH, self._chunk_size), torch.split(targets_N, self._chunk_size), strict=True
            )
        ]
        logprobs_N, entropies_N = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        where = (rows_N, offsets_N)
        zeros_BT = logprobs_N.new_zeros(present_BT.shape)
        return zeros_BT.index_put(where, logprobs_N), zeros_BT.index_put(where, entropies_N)

    def _chunk(self, hidden_CH: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = self.model.get_output_embeddings()(hidden_CH).float() / self.temperature
        logprobs_CV = logits_CV.log_softmax(-1)
        with torch.no_grad():
            entropies_C = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
        return logprobs_CV.gather(-1, targets_C[:, None]).squeeze(-1), entropies_C


@torch.no_grad()
def check(policy: TokenLogprobs) -> None:
    """Compare with the model's own logits on a few tokens.

    Raises:
        UserError: the model does something to its logits after `lm_head` (soft-capping, scaling) that chunks leave out.
    """
    model = policy.model
    token_ids_BS = torch.arange(4, device=model.device)[None]
    ours_T, _ = policy(
        token_ids_BS, torch.tensor([1], device=model.device), torch.ones_like(token_ids_BS[:, 1:]).bool()
    )
    logits_SV = model(input_ids=token_ids_BS, use_cache=False).logits[0].float() / policy.temperature
    theirs_T = logits_SV[:-1].log_softmax(-1).gather(-1, token_ids_BS[0, 1:, None]).squeeze(-1)
    if not torch.allclose(ours_T[0], theirs_T, atol=1e-4):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output embedding (logprobs {theirs_T.tolist()}, "
            "without "
            f"that {ours_T[0].tolist()}), which the trainer does not support; choose a model without "
            "soft-capping of logits."
        )
