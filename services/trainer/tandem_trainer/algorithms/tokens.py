"""The inputs of a loss, per token. Shapes: B rows (one completion each), T completion tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The inputs of a loss. All are [B, T], but the advantages may be [B, 1]."""

    logprobs_BT: Tensor
    """From the policy in training."""
    old_logprobs_BT: Tensor
    """From the policy before the batch's first optimizer step."""
    advantages_BT: Tensor
    mask_BT: Tensor
    """1 where a token counts in the loss, else 0. Has the dtype of the logprobs."""
    ref_logprobs_BT: Tensor | None = None
    sampler_logprobs_BT: Tensor | None = None
    """NaN where the sampler gave no logprob."""
    entropy_BT: Tensor | None = None

    @property
    def log_ratio_BT(self) -> Tensor:
        return self.logprobs_BT - self.old_logprobs_BT

    def row_mean(self, value_BT: Tensor) -> Tensor:
        """Mean of each row over the tokens in the mask: [B, 1]."""
        return (value_BT * self.mask_BT).sum(1, keepdim=True) / self.mask_BT.sum(1, keepdim=True).clamp(min=1)


def required(tensor: Tensor | None, name: str, option: str) -> Tensor:
    """Return `tensor`, which `option` needs.

    Raises:
        ValueError: it is None.
    """
    if tensor is None:
        raise ValueError(f"option {option} got no {name}, expected [B, T] like the logprobs")
    return tensor
