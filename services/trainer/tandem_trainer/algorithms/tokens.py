"""The inputs of a loss, per token or per pair.

Shapes: B rows (one sequence each), T tokens from the first sampled one of a row to the last, P pairs.
"""

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
    """1 where a sampled token counts in the loss, else 0. Has the dtype of the logprobs."""
    trajectory_tokens_B: Tensor | None = None
    """Number of tokens in the loss of the row's trajectory, which may have other rows. None: it has no other rows."""
    ref_logprobs_BT: Tensor | None = None
    sampler_logprobs_BT: Tensor | None = None
    """NaN where the sampler gave no logprob."""
    entropy_BT: Tensor | None = None

    @property
    def log_ratio_BT(self) -> Tensor:
        return self.logprobs_BT - self.old_logprobs_BT

    @property
    def counts_B(self) -> Tensor:
        """Number of tokens in the loss of each row's trajectory, at least 1."""
        counts_B = self.mask_BT.sum(1) if self.trajectory_tokens_B is None else self.trajectory_tokens_B
        return counts_B.clamp(min=1)

    def row_mean(self, value_BT: Tensor) -> Tensor:
        """Mean of each row over the tokens in the mask: [B, 1]."""
        return (value_BT * self.mask_BT).sum(1, keepdim=True) / self.mask_BT.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Pairs:
    """The inputs of a loss over pairs: logprobs of complete trajectories. All are [P]."""

    chosen_P: Tensor
    """Of the preferred trajectories, from the policy in training."""
    rejected_P: Tensor
    """Of the others."""
    ref_chosen_P: Tensor
    """Like `chosen_P`, from the policy that training started from."""
    ref_rejected_P: Tensor

    @property
    def logits_P(self) -> Tensor:
        """By how much more than the reference the policy prefers the preferred trajectory."""
        return (self.chosen_P - self.rejected_P) - (self.ref_chosen_P - self.ref_rejected_P)


def required(tensor: Tensor | None, name: str, option: str) -> Tensor:
    """Return `tensor`, which `option` needs.

    Raises:
        ValueError: it is None.
    """
    if tensor is None:
        raise ValueError(f"option {option} got no {name}, expected [B, T] like the logprobs")
    return tensor
