"""Losses and advantages of the user's project, called and checked.

Tensor names end in their shape: B rows (one sequence each), T tokens from the first sampled one of a row to the last, P
pairs, G trajectories of a group, N values of the complete batch. A tensor whose name ends in BT may be [B, 1].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tandem_protocol.config.learning import GrpoConfig, OnlineDpoConfig
from tandem_rollout.errors import UserError
from tandem_rollout.trajectory import Trajectory

from .base import RECORD_FIELDS, StepTotals
from .functions import NamedFunction
from .objectives import Objective
from .tokens import Pairs, Tokens

TOKEN_FIELDS = tuple(field.name for field in fields(Tokens))
NO_REFERENCE = (
    "take ref_logprobs_BT as a parameter of the function, or set grpo.beta above 0. Otherwise there is no reference "
    "model, and ref_logprobs_BT is None."
)
PAIR_FIELDS = tuple(field.name for field in fields(Pairs))


class ProjectLoss:
    """A loss per token. It is the objective of `grpo.loss_type: module:function`."""

    def __init__(self, options: GrpoConfig) -> None:
        """
        Raises:
            UserError: the function cannot be imported or called.
        """
        offered = (*TOKEN_FIELDS, "tokens", "totals", "options")
        self._function = NamedFunction("loss", options.loss_type, options.loss_arguments, offered)
        self.needs_reference = self._function.has_parameter("ref_logprobs_BT")

    def __call__(self, tokens: Tokens, totals: StepTotals, options: GrpoConfig) -> Objective:
        """
        Raises:
            UserError: the function raised, or returned something else than a loss per token or row.
        """
        of_tokens = {name: getattr(tokens, name) for name in TOKEN_FIELDS}
        if_none = NO_REFERENCE if tokens.ref_logprobs_BT is None else ""
        answer = self._function(**of_tokens, tokens=tokens, totals=totals, options=options, if_none=if_none)
        rows, width = tokens.mask_BT.shape
        shapes: dict[tuple[int, ...], str] = {(rows, width): "the loss of each token", (rows, 1): "one for each row"}
        fix = "Tandem leaves out the tokens that do not count, and averages over the others (trainer.grpo.reduction)."
        return Objective(*_checked(self._function.title, answer, shapes, fix))


class ProjectPairLoss:
    """A loss per pair, for `online_dpo.loss_type: module:function`."""

    def __init__(self, options: OnlineDpoConfig) -> None:
        """
        Raises:
            UserError: the function cannot be imported or called.
        """
        offered = (*PAIR_FIELDS, "logits_P", "pairs", "options")
        self._function = NamedFunction("loss", options.loss_type, options.loss_arguments, offered)

    def __call__(self, pairs: Pairs, options: OnlineDpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Raises:
            UserError: the function raised, or returned something else than a loss per pair.
        """
        of_pairs = {name: getattr(pairs, name) for name in (*PAIR_FIELDS, "logits_P")}
        answer = self._function(**of_pairs, pairs=pairs, options=options)
        fix = "Tandem averages over the pairs of the step."
        return _checked(self._function.title, answer, {tuple(pairs.chosen_P.shape): "the loss of each pair"}, fix)


class ProjectAdvantage:
    """The advantages of a group, for `grpo.advantage: module:function`."""

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: the function cannot be imported or called.
        """
        offered = ("rewards_G", "batch_rewards_N", "trajectories", "options")
        self._function = NamedFunction("advantage", name, arguments, offered)

    def __call__(
        self, rewards_G: Tensor, batch_rewards_N: Tensor, trajectories: Sequence[Trajectory], options: GrpoConfig
    ) -> list[float]:
        """
        Args:
            rewards_G: of the trajectories that count, at least one.
            batch_rewards_N: the same of all groups on all ranks.

        Raises:
            UserError: the function raised, or returned something else than a finite number per trajectory.
        """
        answer = self._function(
            rewards_G=rewards_G.clone(),
            batch_rewards_N=batch_rewards_N.clone(),
            trajectories=list(trajectories),
            options=options,
        )
        try:
            advantages_G = torch.as_tensor(answer, dtype=torch.float64)
        except (RuntimeError, TypeError, ValueError):
            advantages_G = torch.empty(0)
        if advantages_G.shape != rewards_G.shape or not advantages_G.isfinite().all():
            got = described(answer) if advantages_G.shape != rewards_G.shape else f"{advantages_G.tolist()}"
            raise UserError(
                f"{self._function.title} returned {got} for the rewards {rewards_G.tolist()}, expected "
                f"{len(rewards_G)} finite numbers, one per trajectory. Fix: correct the function."
            )
        return advantages_G.tolist()


def _checked(
    title: str, answer: Any, shapes: Mapping[tuple[int, ...], str], fix: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Split what a loss returned into the loss and its metrics, which get the first of `shapes`.

    Args:
        shapes: each shape that the loss may have, and what it is then.

    Raises:
        UserError: the loss has none of these shapes, or a metric cannot be expanded to the first.
    """
    loss = answer
    metrics: Mapping[Any, Any] = {}
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping):
        loss, metrics = answer
    if not isinstance(loss, Tensor) or tuple(loss.shape) not in shapes or not loss.is_floating_point():
        expected = ", or ".join(f"{list(shape)}, {meaning}" for shape, meaning in shapes.items())
        raise UserError(
            f"{title} returned {described(loss)}, expected a floating-point tensor of shape {expected}. A dict of "
            f"metrics may follow it. Fix: return the losses without a mean or sum. {fix}"
        )
    return loss, {name: _metric(title, name, value, next(iter(shapes)), loss) for name, value in metrics.items()}


def _metric(title: str, name: Any, value: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
    check_metric_name(title, name)
    try:
        return torch.as_tensor(value, device=like.device, dtype=like.dtype).detach().expand(shape)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{title} returned {described(value)} as its metric {name!r}, expected a number, or a tensor of shape "
            f"{list(shape)}. Fix: return one number for all, or one for each."
        ) from error


def check_metric_name(title: str, name: Any, taken: Collection[str] = RECORD_FIELDS) -> None:
    """Check that a metric of the project can be a field of `metrics.jsonl`.

    Raises:
        UserError: it is not text, or Tandem writes a field of this name itself.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"{title} returned a metric with the name {name!r}, expected text. Fix: use text as its key.")
    if name in taken:
        raise UserError(
            f"{title} returned a metric with the name {name!r}, which metrics.jsonl has already. Fix: rename it."
        )


def described(value: Any) -> str:
    """What a function returned, for messages: the shape of a tensor, the type of everything else."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
