"""What an update computed about its sequences, for the people who read them.

The learner computes the logprob of every sampled token anyway. They are looked up by sequence, because the rows of a
batch are in another order than its groups, and an algorithm leaves out rows from which nothing is learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tandem_rollout.trajectory import Sequence as TokenSequence
from tandem_rollout.trajectory import Trajectory

from ..batch import Batch


class TrainedTokens:
    """Advantages of an update, and the logprobs from before its first optimizer step, in the host's memory."""

    def __init__(self, batch: Batch, micro_batches: Sequence[Batch], logprobs: Sequence[Tensor]) -> None:
        """
        Args:
            batch: all rows of this rank.
            micro_batches: its parts.
            logprobs: [B, T] for each part.
        """
        self._sequences = batch.sequences  # kept, because an id is reused when its object is gone
        counts_B = batch.mask_BT.any(1)
        learned = zip(batch.sequences, counts_B.tolist(), batch.advantages_B.tolist(), strict=True)
        self._advantages = {id(sequence): advantage for sequence, counts, advantage in learned if counts}
        self._rows: dict[int, Tensor] = {}
        for micro_batch, logprobs_BT in zip(micro_batches, _on_host(logprobs), strict=True):
            self._rows.update(zip(map(id, micro_batch.sequences), logprobs_BT, strict=True))

    def advantage(self, trajectory: Trajectory) -> float:
        """What the loss multiplied the tokens with. 0 if nothing was learned from the trajectory."""
        known = (self._advantages.get(id(sequence)) for sequence in trajectory.sequences)
        return next((advantage for advantage in known if advantage is not None), 0.0)

    def logprobs(self, sequence: TokenSequence) -> list[list[float]] | None:
        """The logprobs of each sampled span, in nats. None if the update did not compute them."""
        row_T = self._rows.get(id(sequence))
        if row_T is None:
            return None
        first = sequence.sampled[0].start
        return [row_T[span.start - first : span.end - first].tolist() for span in sequence.sampled]


def _on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy all tensors to the host's memory at once, because each copy waits for the device."""
    flat_N = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    sizes = [tensor.numel() for tensor in tensors]
    return [part_N.view_as(tensor) for part_N, tensor in zip(torch.split(flat_N, sizes), tensors, strict=True)]
