"""Sample and score the groups of a request that is answered with single turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.messages import Group as Answer
from tandem_protocol.messages import RolloutRequest, Sampling

from .client import GeneratorClient
from .completions import CompletionReader
from .prompts import PromptRow
from .rewards.scoring import Scorer
from .tasks import task_group
from .trajectory import Group

UNSHAPED: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""The values with which the generator samples from the unchanged distribution of the policy."""


def sampling(config: RolloutConfig) -> Sampling:
    """Make the sampling options of training requests."""
    return Sampling(
        n=config.num_generations,
        max_tokens=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        stop_token_ids=config.stop_token_ids,
    )


@dataclass(frozen=True)
class Sampler:
    """Samples trajectories of one turn from the generators, and scores them."""

    client: GeneratorClient
    read: CompletionReader
    scorer: Scorer

    can_score_again = True
    """Whether a group from a checkpoint can be scored again. Otherwise it has to be sampled again."""

    async def collect(
        self,
        request: RolloutRequest,
        rows: Sequence[PromptRow],
        keep: Callable[[int, Group], object],
        *,
        timeout_s: float,
    ) -> None:
        """Send `request` and score each group as it arrives.

        Args:
            rows: the rows of the request's prompts.
            keep: called with the index of the prompt and its group.

        Raises:
            TimeoutError: groups are missing after `timeout_s`, or rewards another `timeout_s` after the last group.
            TandemError: a generator refused the request.
            UserError: a reward function failed.
        """

        async def score(answer: Answer) -> None:
            row = rows[answer.prompt_index]
            trajectories = await self.scorer.score(row, self.read(row, answer))
            keep(answer.prompt_index, Group(row=row.index, trajectories=trajectories))

        async with task_group() as scoring:
            tasks: list[asyncio.Task[None]] = []
            await self.client.rollouts(
                request, lambda answer: tasks.append(scoring.create_task(score(answer))), timeout_s=timeout_s
            )
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            if late:
                raise TimeoutError(
                    f"{len(late)} of {len(tasks)} groups are not scored {timeout_s:g} s after the last one arrived. "
                    "The reward functions are slow or hang. Fix: make them faster, or raise trainer.rollout.timeout_s."
                )
