"""An algorithm of the user's project, called and checked."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.errors import UserError
from tandem_rollout.functions import load_callable
from tandem_rollout.trajectory import Group

from ..batch import Batch
from .base import Algorithm, Gather, Mean, MicroBatchLoss, StepTotals
from .functions import accepted, errors_of
from .project import check_metric_name, described


class ProjectAlgorithm(Algorithm):
    """The object of `algorithm: module:Class`. What it leaves out has the default of `Algorithm`."""

    def __init__(self, config: TrainerConfig) -> None:
        """
        Raises:
            UserError: the class cannot be imported or called, or it lacks a method.
        """
        self._title = f"algorithm {config.algorithm}"
        make = load_callable("algorithm", config.algorithm)
        with errors_of(self._title):
            self._inner: Any = make(config, **copy.deepcopy(config.algorithm_arguments))
        if inspect.isclass(self._inner) or not all(
            callable(getattr(self._inner, name, None)) for name in ("make_batch", "loss")
        ):
            raise UserError(
                f"{self._title} made {described(self._inner)}, expected an object with the methods make_batch and "
                "loss. Fix: derive the class from tandem_trainer.algorithms.Algorithm, Grpo or OnlineDpo."
            )
        self.needs_reference = getattr(self._inner, "needs_reference", self.needs_reference)
        self.num_iterations = getattr(self._inner, "num_iterations", self.num_iterations)
        self.entropy_quantile = getattr(self._inner, "entropy_quantile", self.entropy_quantile)

    def make_batch(self, groups: Sequence[Group], gather: Gather) -> Batch:
        """
        Raises:
            UserError: the method raised, or returned something else than a batch.
        """
        lost: list[BaseException] = []

        def gathered(values: list[float]) -> list[float]:
            try:
                return gather(values)
            except Exception as error:  # another rank has ended
                lost.append(error)
                raise

        method = self._inner.make_batch
        with errors_of(f"{self._title}, make_batch", passed=lost):
            batch = method(groups, **dict.fromkeys(accepted(method, ["gather"]), gathered))
        if not isinstance(batch, Batch):
            raise UserError(
                f"{self._title}, make_batch: returned {described(batch)}, expected a tandem_trainer.algorithms.Batch. "
                "Fix: return pad(rows, trajectory_total=…, token_total=…)."
            )
        return batch

    def loss(self, logprobs_BT: Tensor, batch: Batch, totals: StepTotals, **tensors: Any) -> MicroBatchLoss:
        """
        Raises:
            UserError: the method raised, or returned something else than a scalar loss with its metrics.
        """
        method = self._inner.loss
        if_none = "" if self.needs_reference else "set needs_reference = True in the class, if it uses ref_logprobs_BT."
        with errors_of(f"{self._title}, loss", if_none=if_none):
            taken = {name: tensors[name] for name in accepted(method, list(tensors))}
            answer = method(logprobs_BT, batch, totals, **taken)
        if not isinstance(answer, MicroBatchLoss) or not _is_scalar(answer.loss):
            got = described(answer.loss if isinstance(answer, MicroBatchLoss) else answer)
            raise UserError(
                f"{self._title}, loss: returned {got}, expected a MicroBatchLoss with a scalar tensor. Fix: return "
                "MicroBatchLoss(loss), where loss is a sum over the tokens divided by totals.tokens, for example."
            )
        for name, mean in answer.metrics.items():
            check_metric_name(self._title, name)
            if not isinstance(mean, Mean) or not all(map(_is_scalar, mean)):
                raise UserError(
                    f"{self._title}, loss: returned {described(mean)} as its metric {name!r}, expected a Mean of "
                    "scalar tensors. Fix: return Mean.over(values, weights)."
                )
        return answer


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0
