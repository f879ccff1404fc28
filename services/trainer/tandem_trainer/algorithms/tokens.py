"""What a loss knows of each token. Shapes: B rows (one completion each), T completion tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """All [B, T], but the advantages may be [B, 1]."""

    logprobs_BT: Tensor
    """Of the policy in training."""
    old_logprobs_BT: Tensor
    """Of the policy before the batch's first optimizer step."""
    advantages_BT: Tensor
    mask_BT: Tensor
    """1 where a token counts in the loss, else 0; of the logprobs' dtype."""
    ref_logprobs_BT: Tensor | None = None
    sampler_logprobs_BT: Tensor | None = None
    """NaN where the sampler gave none."""
    entropy_BT: Tensor | None = None
    entropy_threshold: Tensor | None = None
    """Of the whole step, a scalar."""

    @property
    def log_ratio_BT(self) -> Tensor:
        return self.logprobs_BT - self.old_logprobs_BT

    def row_mean(self, value_BT: Tensor) -> Tensor:
        """[B, 1], over the tokens in the mask."""
        return (value_BT * self.mask_BT).sum(1, keepdim=True) / self.mask_BT.sum(1, keepdim=True).clamp(min=1)


def wanted(tensor: Tensor | None, name: str, option: str) -> Tensor:
    """The tensor.

    Raises:
        ValueError: it is not given.
    """
    if tensor is None:
        raise ValueError(f"option {option} got no {name}, expected [B, T] like logps")
    return tensor
