"""Training data of one update: rows, and the padded tensors made from them.

Tensor names end in their shape. B: rows, one completion each. S: prompt and completion tokens. T: completion tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tandem_protocol.messages import Completion


@dataclass(frozen=True)
class Row:
    """One completion of the batch."""

    prompt_ids: Sequence[int]
    completion: Completion
    advantage: float
    in_loss: bool
    """Whether its tokens count in the loss."""


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors of B rows.

    `row_total` and `token_total` normalize the loss. They may count rows that are not in these tensors, such as those
    of the other micro-batches.
    """

    token_ids_BS: Tensor
    prompt_lengths_B: Tensor
    completion_lengths_B: Tensor
    mask_BT: Tensor
    """1.0 where a token counts in the loss."""
    sampler_logprobs_BT: Tensor
    sampled_at_BT: Tensor
    """Version step of the policy that sampled the token; −1 for padding."""
    advantages_B: Tensor
    row_total: int
    token_total: int
    rows_together: int = 1
    """Number of consecutive rows that must share a micro-batch."""

    @property
    def has_signal(self) -> bool:
        """Whether any token in the loss has a nonzero advantage."""
        return bool((self.mask_BT.any(1) & (self.advantages_B != 0)).any())

    @property
    def completion_mask_BT(self) -> Tensor:
        """True where there is a sampled token, whether or not it counts in the loss."""
        positions_T = torch.arange(self.mask_BT.shape[1], device=self.mask_BT.device)
        return positions_T < self.completion_lengths_B[:, None]

    @property
    def model_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments for a call of `TokenLogprobs`."""
        return self.token_ids_BS, self.prompt_lengths_B, self.completion_mask_BT

    def to(self, device: torch.device) -> Batch:
        """Return a copy with all tensors on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **tensors})

    def micro_batches(self, max_tokens: int) -> Iterator[Batch]:
        """Split into micro-batches of at most `max_tokens` padded tokens, with rows of similar length together.

        A row longer than `max_tokens` gets its own micro-batch.
        """
        together = self.rows_together
        lengths = (self.prompt_lengths_B + self.completion_lengths_B).view(-1, together).amax(1).tolist()
        rows: list[int] = []
        for unit in sorted(range(len(lengths)), key=lengths.__getitem__):
            if rows and lengths[unit] * (len(rows) + together) > max_tokens:
                yield self._select(rows)
                rows = []
            rows.extend(range(unit * together, (unit + 1) * together))
        yield self._select(rows)

    def weightless(self) -> Batch:
        """Return the smallest possible batch, with a loss of 0.

        A rank that has run out of micro-batches computes it, so that every rank joins the same collective operations.
        """
        rows = self._select(list(range(self.rows_together)))
        return replace(rows, mask_BT=torch.zeros_like(rows.mask_BT), advantages_B=torch.zeros_like(rows.advantages_B))

    def _select(self, rows: list[int]) -> Batch:
        picked_B = torch.tensor(rows, device=self.token_ids_BS.device)
        prompts_B = self.prompt_lengths_B[picked_B]
        completions_B = self.completion_lengths_B[picked_B]
        seq_len = int((prompts_B + completions_B).max())
        completion_len = max(1, int(completions_B.max()))
        return Batch(
            token_ids_BS=self.token_ids_BS[picked_B, :seq_len],
            prompt_lengths_B=prompts_B,
            completion_lengths_B=completions_B,
            mask_BT=self.mask_BT[picked_B, :completion_len],
            sampler_logprobs_BT=self.sampler_logprobs_BT[picked_B, :completion_len],
            sampled_at_BT=self.sampled_at_BT[picked_B, :completion_len],
            advantages_B=self.advantages_B[picked_B],
            row_total=self.row_total,
            token_total=self.token_total,
            rows_together=self.rows_together,
        )


def pad(rows: Sequence[Row], *, row_total: int, token_total: int, rows_together: int = 1) -> Batch:
    """Return the padded tensors of `rows`.

    The padding value does not matter: padding is on the right and attention is causal, so no token sees it.
    """
    completions = [row.completion for row in rows]
    return Batch(
        token_ids_BS=pad_sequence(
            [torch.tensor([*r.prompt_ids, *r.completion.token_ids]) for r in rows], batch_first=True
        ),
        prompt_lengths_B=torch.tensor([len(row.prompt_ids) for row in rows]),
        completion_lengths_B=torch.tensor([len(c.token_ids) for c in completions]),
        mask_BT=pad_sequence([torch.full((len(r.completion.token_ids),), float(r.in_loss)) for r in rows], True),
        sampler_logprobs_BT=pad_sequence([torch.tensor(c.logprobs) for c in completions], batch_first=True),
        sampled_at_BT=pad_sequence([_sampled_at(c) for c in completions], batch_first=True, padding_value=-1),
        advantages_B=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        row_total=row_total,
        token_total=token_total,
        rows_together=rows_together,
    )


def _sampled_at(completion: Completion) -> Tensor:
    """[T]. Return the version step of each token."""
    steps = [span.version.step for span in completion.versions]
    counts = [span.tokens for span in completion.versions]
    return torch.repeat_interleave(torch.tensor(steps, dtype=torch.long), torch.tensor(counts, dtype=torch.long))
