"""Training data of one update: rows, and the padded tensors made from them.

Example: in an episode, the policy calls a tool and then answers. Its row has the tokens `prompt call result answer`.
The columns T begin with the call. `sampled_mask_BT` is True for the tokens of the call and of the answer. It is False
for those of the result, so they count neither in the loss nor in any metric.

Tensor names end in their shape. B: rows, one sequence each. S: all tokens of a row, up to the last sampled one. T: its
tokens from the first sampled one to the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tandem_protocol.messages import VersionSpan
from tandem_protocol.version import Version
from tandem_rollout.trajectory import NOT_SAMPLED, Span, Trajectory
from tandem_rollout.trajectory import Sequence as TokenSequence

from .micro_batches import PackedPrompts, Part, TokenRow, plan


@dataclass(frozen=True)
class Row:
    """One sequence of the batch."""

    sequence: TokenSequence
    """At least one of its tokens is sampled."""
    advantage: float
    """Of its trajectory."""
    in_loss: bool
    """Whether its sampled tokens count in the loss."""
    trajectory_tokens: int
    """Number of sampled tokens of its trajectory, which may have other rows."""
    unit: int | None = None
    """Rows with the same unit share a micro-batch. None: it may be in a micro-batch of its own."""

    @property
    def start(self) -> int:
        """Position of the first sampled token."""
        return self.sequence.sampled[0].start

    @property
    def end(self) -> int:
        """Position behind the last sampled token. Nothing is learned from the tokens that follow."""
        return self.sequence.sampled[-1].end


NOTHING = Row(
    TokenSequence(
        token_ids=(0, 0),
        sampled=(Span(start=1, end=2),),
        logprobs=(0.0, 0.0),
        versions=(VersionSpan(version=Version(0, 0), tokens=1),),
    ),
    advantage=0.0,
    in_loss=False,
    trajectory_tokens=1,
)
"""The row of a rank that has no sampled tokens. A batch has at least one row."""


def rows_of(trajectory: Trajectory, advantage: float, *, in_loss: bool = True, unit: int | None = None) -> list[Row]:
    """Return a row for each sequence of the trajectory that has sampled tokens."""
    return [
        Row(sequence, advantage, in_loss, trajectory.num_sampled, unit)
        for sequence in trajectory.sequences
        if sequence.num_sampled
    ]


class SharedPrompts(NamedTuple):
    """Prompts that are computed once for all rows that begin with them. P: prompts. L: tokens of each prompt."""

    token_ids_PL: Tensor
    prompt_B: Tensor
    """For each row, the number of its prompt: its first L tokens are `token_ids_PL[prompt_B]`."""
    is_first: bool
    """Whether this is the first of the micro-batches with these prompts, which follow each other."""
    is_last: bool
    """Whether this is the last of them."""


ModelInputs = tuple[Tensor, Tensor, Tensor, SharedPrompts | None]


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors of B rows.

    `trajectory_total` and `token_total` normalize the loss. They may count rows that are not in these tensors, such as
    those of the other micro-batches.
    """

    token_ids_BS: Tensor
    starts_B: Tensor
    """Position in S of the first sampled token, where T begins."""
    ends_B: Tensor
    """Position in S behind the last sampled token."""
    sampled_mask_BT: Tensor
    """True where the policy sampled the token, whether or not it counts in the loss."""
    mask_BT: Tensor
    """1.0 where a sampled token counts in the loss."""
    sampler_logprobs_BT: Tensor
    """0.0 for tokens that were not sampled."""
    sampled_at_BT: Tensor
    """Version step of the policy that sampled the token; −1 if none did."""
    advantages_B: Tensor
    trajectory_tokens_B: Tensor
    """Number of sampled tokens of the row's trajectory."""
    unit_B: Tensor
    """Consecutive numbers from 0. Rows with the same number share a micro-batch."""
    trajectory_total: int
    token_total: int
    shared: SharedPrompts | None = None
    """None: the prompt of each row is computed with the row."""
    sequences: tuple[TokenSequence, ...] = ()
    """The sequence of each row."""

    @property
    def num_units(self) -> int:
        """Number of units in these tensors."""
        return int(self.unit_B[-1]) + 1

    @property
    def has_signal(self) -> bool:
        """Whether any token in the loss has a nonzero advantage."""
        return bool((self.mask_BT.any(1) & (self.advantages_B != 0)).any())

    @property
    def model_inputs(self) -> ModelInputs:
        """Arguments for a call of `TokenLogprobs`."""
        return self.token_ids_BS, self.starts_B, self.sampled_mask_BT, self.shared

    def to(self, device: torch.device) -> Batch:
        """Return a copy with all tensors on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **tensors})

    def micro_batches(
        self, max_tokens: int, *, shares_prompts: bool = False, packed: PackedPrompts | None = None
    ) -> Iterator[Batch]:
        """Split into micro-batches of at most `max_tokens` padded tokens, with units of similar length together.

        A unit longer than `max_tokens` gets its own micro-batch.

        Args:
            shares_prompts: compute equal prompts once, where that is worthwhile.
            packed: compute them in one row with the rows that begin with them.
        """
        values = zip(self.token_ids_BS.tolist(), self.starts_B.tolist(), self.ends_B.tolist(), strict=True)
        rows = [TokenRow(*of_row) for of_row in values]
        for part in plan(rows, self._units(), max_tokens, shares_prompts=shares_prompts, packed=packed):
            yield replace(self._select(part.units), shared=self._shared(part))

    def weightless(self) -> Batch:
        """Return a small batch with a loss of 0.

        A rank that has run out of micro-batches computes it, so that every rank joins the same collective operations.
        """
        rows = self._select(self._units()[:1])
        return replace(rows, mask_BT=torch.zeros_like(rows.mask_BT), advantages_B=torch.zeros_like(rows.advantages_B))

    def _units(self) -> list[list[int]]:
        """The rows of each unit."""
        units: list[list[int]] = [[] for _ in range(self.num_units)]
        for row, unit in enumerate(self.unit_B.tolist()):
            units[unit].append(row)
        return units

    def _shared(self, part: Part) -> SharedPrompts | None:
        if not part.length:
            return None
        return SharedPrompts(
            token_ids_PL=self.token_ids_BS[part.prompt_rows, : part.length],
            prompt_B=torch.tensor(part.prompts, device=self.token_ids_BS.device),
            is_first=part.is_first,
            is_last=part.is_last,
        )

    def _select(self, units: list[list[int]]) -> Batch:
        """The rows of these units, without the padding that they do not need."""
        device = self.token_ids_BS.device
        picked = [row for rows in units for row in rows]
        picked_B = torch.tensor(picked, device=device)
        starts_B = self.starts_B[picked_B]
        ends_B = self.ends_B[picked_B]
        length = int(ends_B.max())
        width = int((ends_B - starts_B).max())
        return Batch(
            token_ids_BS=self.token_ids_BS[picked_B, :length],
            starts_B=starts_B,
            ends_B=ends_B,
            sampled_mask_BT=self.sampled_mask_BT[picked_B, :width],
            mask_BT=self.mask_BT[picked_B, :width],
            sampler_logprobs_BT=self.sampler_logprobs_BT[picked_B, :width],
            sampled_at_BT=self.sampled_at_BT[picked_B, :width],
            advantages_B=self.advantages_B[picked_B],
            trajectory_tokens_B=self.trajectory_tokens_B[picked_B],
            unit_B=torch.tensor([number for number, rows in enumerate(units) for _ in rows], device=device),
            trajectory_total=self.trajectory_total,
            token_total=self.token_total,
            sequences=tuple(self.sequences[row] for row in picked),
        )


def pad(rows: Sequence[Row], *, trajectory_total: int, token_total: int) -> Batch:
    """Return the padded tensors of `rows`, or of `NOTHING` if there are none. Rows of the same unit follow each other.

    Args:
        rows: those of this rank.
        trajectory_total: number of trajectories of this rank that count in the loss.
        token_total: number of their sampled tokens.

    The padding value does not matter: padding is on the right and attention is causal, so no token sees it.
    """
    rows = rows or [NOTHING]
    sampled_mask_BT = _padded([torch.tensor(row.sequence.mask[row.start : row.end]) for row in rows]).bool()
    in_loss_B = torch.tensor([float(row.in_loss) for row in rows])
    return Batch(
        token_ids_BS=_padded([torch.tensor(row.sequence.token_ids[: row.end]) for row in rows]),
        starts_B=torch.tensor([row.start for row in rows]),
        ends_B=torch.tensor([row.end for row in rows]),
        sampled_mask_BT=sampled_mask_BT,
        mask_BT=sampled_mask_BT * in_loss_B[:, None],
        sampler_logprobs_BT=_padded([torch.tensor(row.sequence.logprobs[row.start : row.end]) for row in rows]),
        sampled_at_BT=_padded([torch.tensor(row.sequence.steps[row.start : row.end]) for row in rows], NOT_SAMPLED),
        advantages_B=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        trajectory_tokens_B=torch.tensor([row.trajectory_tokens for row in rows]),
        unit_B=_unit_numbers([row.unit for row in rows]),
        trajectory_total=trajectory_total,
        token_total=token_total,
        sequences=tuple(row.sequence for row in rows),
    )


def _padded(rows: list[Tensor], value: int = 0) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)


def _unit_numbers(units: list[int | None]) -> Tensor:
    """[B]. A row without a unit gets one of its own."""
    numbers = [0]
    for before, unit in pairwise(units):
        numbers.append(numbers[-1] + (unit is None or unit != before))
    return torch.tensor(numbers)
