"""Try an algorithm out on a few invented tokens, so that mistakes in losses of the project are found before the run.

Tensor names end in their shape: B rows (one sequence each), T tokens from the first sampled one of a row to the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.messages import VersionSpan
from tandem_protocol.version import Version
from tandem_rollout.errors import UserError
from tandem_rollout.trajectory import Group, Sequence, Span, Trajectory

from ..batch import Batch
from .base import Algorithm, StepTotals
from .corrections import entropy_quantile

LENGTHS = (3, 5, 2, 4)
"""Number of sampled tokens of the trajectories, in turn."""
TOLERANCE = 1e-3
"""Largest relative difference between the loss of a batch and that of its parts."""


class Outcome(NamedTuple):
    """What micro-batches add up to."""

    loss: float
    gradient: float
    """Sum of the squared gradients of all logprobs."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient)

    def __str__(self) -> str:
        return f"loss {self.loss:g} and squared gradient {self.gradient:g}"


def rehearse(algorithm: Algorithm, config: TrainerConfig, device: torch.device) -> None:
    """Compute the loss of three groups at once, and row by row. Random numbers of the run are not used.

    Raises:
        UserError: the algorithm raised, its loss is not finite or has no gradient, or it depends on the micro-batches.
    """
    name = (
        f"algorithm {config.algorithm}, loss {config.grpo.loss_type}"
        if config.algorithm == "grpo"
        else (f"algorithm {config.algorithm}")
    )
    with torch.random.fork_rng(devices=[]):
        groups = [_group(0, config), _group(1, config), _group(2, config, fails=True)]
        batch = algorithm.make_batch(groups, list).to(device)
        totals = _totals(batch, algorithm, config)
        whole = _outcome(name, [batch], totals, algorithm)
        if not whole.is_finite:
            raise UserError(
                f"{name}: got {whole} for a batch of {len(batch.starts_B)} rows, expected finite numbers. Fix: look "
                "for a division by 0, a logarithm of 0, or a value at a token that does not count (mask_BT is 0 there)."
            )
        parts = _outcome(name, batch.micro_batches(1), totals, algorithm)
        is_random = not _equal(whole, _outcome(name, [batch], totals, algorithm))
        if not is_random and not _equal(whole, parts):
            raise UserError(
                f"{name}: got {whole} for a batch, and {parts} for the sum of its rows, expected the same. So the "
                "result would depend on max_tokens_per_micro_batch and on the number of processes. Fix: compute each "
                "row without the others: no mean, standard deviation or rank over B. Divide by the totals only."
            )
        alone = _outcome(name, [batch.weightless()], totals, algorithm)
        if not alone.is_finite or abs(alone.loss) > TOLERANCE:
            raise UserError(
                f"{name}: got {alone} for rows of which no token counts (mask_BT is 0), expected 0. Several trainer "
                "processes compute such rows. Fix: clamp what you divide by, as in `mask_BT.sum(1).clamp(min=1)`."
            )


def _equal(one: Outcome, other: Outcome) -> bool:
    return _near(one.loss, other.loss) and _near(one.gradient, other.gradient)


def _near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE**2)


def _outcome(name: str, micro_batches: Iterable[Batch], totals: StepTotals, algorithm: Algorithm) -> Outcome:
    loss = gradient = 0.0
    for batch in micro_batches:
        logprobs_BT = _invented(batch, 0.9).requires_grad_()
        micro_batch_loss = algorithm.loss(
            logprobs_BT,
            batch,
            totals,
            entropy_BT=-_invented(batch, 0.5),
            old_logprobs_BT=_invented(batch, 0.95),
            ref_logprobs_BT=_invented(batch, 1.05) if algorithm.needs_reference else None,
        )
        gradient_BT = None
        if micro_batch_loss.loss.requires_grad:
            (gradient_BT,) = torch.autograd.grad(micro_batch_loss.loss, logprobs_BT, allow_unused=True)
        if gradient_BT is None:
            raise UserError(
                f"{name}: the loss has no gradient, expected one that depends on logprobs_BT. Fix: compute it from "
                "logprobs_BT, without detach(), item() or torch.no_grad(). Entropies and old logprobs have no gradient."
            )
        loss += float(micro_batch_loss.loss.detach())
        gradient += float(gradient_BT.square().sum())
    return Outcome(loss, gradient)


def _invented(batch: Batch, factor: float) -> Tensor:
    """Logprobs near those of the sampler: [B, T]. They depend only on the row, so a micro-batch has the same."""
    return batch.sampler_logprobs_BT * factor


def _totals(batch: Batch, algorithm: Algorithm, config: TrainerConfig) -> StepTotals:
    threshold = None
    if algorithm.entropy_quantile is not None:
        threshold = entropy_quantile(-_invented(batch, 0.5)[batch.mask_BT.bool()], algorithm.entropy_quantile)
    length = config.rollout.max_completion_length
    return StepTotals(batch.trajectory_total, batch.token_total, threshold, length)


def _group(row: int, config: TrainerConfig, *, fails: bool = False) -> Group:
    """A group with different rewards. With `fails`, its last episode failed, which can happen in any step."""
    size = config.rollout.num_generations
    finished = [_trajectory(row, index, config) for index in range(size - fails)]
    failed = Trajectory(sequences=(), messages=_messages(), num_prompt_messages=1, status="failed", reason="rehearsal")
    return Group(row=row, trajectories=(*finished, *[failed] * fails))


def _trajectory(row: int, index: int, config: TrainerConfig) -> Trajectory:
    """One episode with a prompt of two tokens. In every second one, two turns with a token between them."""
    length = LENGTHS[(row + index) % len(LENGTHS)]
    turns = [length] if index % 2 else [1, length - 1]
    spans: list[Span] = []
    logprobs = [0.0, 0.0]
    for turn in turns:
        logprobs += [0.0] * bool(spans)
        spans.append(Span(start=len(logprobs), end=len(logprobs) + turn))
        logprobs += [-0.2 - 0.3 * ((row + index + token) % 4) for token in range(turn)]
    sequence = Sequence(
        token_ids=(1,) * len(logprobs),
        sampled=tuple(spans),
        logprobs=tuple(logprobs),
        versions=(VersionSpan(version=Version(0, 1), tokens=length),),
    )
    reward = (index + 1) / config.rollout.num_generations
    return Trajectory(
        sequences=(sequence,),
        messages=_messages(),
        num_prompt_messages=1,
        rewards=dict.fromkeys(config.scorers, reward),
        reward=reward,
        status="finished",
        turns=len(turns),
    )


def _messages() -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": "prompt"}, {"role": "assistant", "content": "completion"})
