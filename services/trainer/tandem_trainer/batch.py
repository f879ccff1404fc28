"""What one update trains on: scored groups, and the padded tensors made of them.

Tensor names end in their shape: B rows (one completion each), S prompt + completion tokens, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tandem_protocol.messages import Completion, Group, Message


class ScoredGroup(Message):
    """All completions of one prompt with their rewards. A message, so that a checkpoint can hold it."""

    row: int
    """Of the prompt in the data set."""
    prompt_ids: tuple[int, ...]
    prompt_text: str
    texts: tuple[str, ...]
    """Of the completions, without special tokens."""
    group: Group
    rewards: tuple[float | None, ...]
    """Weighted sum over the reward functions; None where no function gave one."""
    rewards_by_function: dict[str, tuple[float | None, ...]]

    @property
    def oldest_step(self) -> int:
        """Version step of the oldest policy that sampled any of its tokens."""
        return oldest_step(self.group)

    @property
    def has_signal(self) -> bool:
        """Whether its rewards differ at all: otherwise every advantage is 0."""
        return len({reward for reward in self.rewards if reward is not None}) > 1


def oldest_step(group: Group) -> int:
    """Version step of the oldest policy that sampled any token of `group`."""
    return min(span.version.step for completion in group.completions for span in completion.versions)


@dataclass(frozen=True)
class Row:
    """One completion to train on."""

    prompt_ids: Sequence[int]
    completion: Completion
    advantage: float
    in_loss: bool


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors of B rows; row_total and token_total normalise the loss and may count rows left out here."""

    token_ids_BS: Tensor
    prompt_lengths_B: Tensor
    completion_lengths_B: Tensor
    mask_BT: Tensor
    """1.0 where a token counts in the loss."""
    sampler_logprobs_BT: Tensor
    sampled_at_BT: Tensor
    """Version step of the policy that sampled the token; −1 in padding."""
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
        """Where a sampled token is, in the loss or not."""
        positions_T = torch.arange(self.mask_BT.shape[1], device=self.mask_BT.device)
        return positions_T < self.completion_lengths_B[:, None]

    @property
    def model_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `TokenLogprobs`."""
        return self.token_ids_BS, self.prompt_lengths_B, self.completion_mask_BT

    def to(self, device: torch.device) -> Batch:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **tensors})

    def micro_batches(self, max_tokens: int) -> Iterator[Batch]:
        """Split into micro-batches of rows of similar length, each of at most `max_tokens` padded tokens.

        A row that is longer than that gets a micro-batch of its own.
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
        """As few rows as can be, which no loss counts."""
        rows = self._select(list(range(self.rows_together)))
        return replace(rows, mask_BT=torch.zeros_like(rows.mask_BT), advantages_B=torch.zeros_like(rows.advantages_B))

    def _select(self, rows: list[int]) -> Batch:
        picked_B = torch.tensor(rows, device=self.token_ids_BS.device)
        prompts_B, completions_B = self.prompt_lengths_B[picked_B], self.completion_lengths_B[picked_B]
        seq_len, completion_len = int((prompts_B + completions_B).max()), max(1, int(completions_B.max()))
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
    """The tensors of `rows`. The padding value is never read: attention is causal and padding stands on the right."""
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
    """[T]. Version step of each token."""
    steps, counts = [span.version.step for span in completion.versions], [span.tokens for span in completion.versions]
    return torch.repeat_interleave(torch.tensor(steps, dtype=torch.long), torch.tensor(counts, dtype=torch.long))
