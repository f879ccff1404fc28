"""What the loop and the learner need of an algorithm.

Tensor names end in their shape: B rows (one completion each), T completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ..batch import Batch, ScoredGroup


class Totals(NamedTuple):
    """What normalises a loss: counts of the whole step, over all micro-batches and ranks."""

    rows: int
    tokens: int


class LossFunction(Protocol):
    """From a micro-batch to its share of the step's loss, and metrics as means over its tokens in the loss."""

    def __call__(
        self,
        logprobs_BT: Tensor,
        batch: Batch,
        totals: Totals,
        *,
        entropy_BT: Tensor,
        ref_logprobs_BT: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


class Algorithm(Protocol):
    """One way to learn from scored groups."""

    needs_reference: bool
    """Whether `loss` wants logprobs of the policy that training started from."""

    @property
    def loss(self) -> LossFunction: ...

    def make_batch(self, groups: Sequence[ScoredGroup]) -> Batch:
        """The rows to train on, at least one; `has_signal` is False when there is nothing to learn from them."""
        ...
