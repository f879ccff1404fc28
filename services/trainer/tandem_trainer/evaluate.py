"""Evaluate the policy on held-out prompts. The trajectories are sampled and scored as in training.

With a judge, the reward is the win rate against the first policy that the run evaluated.
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from anyio.from_thread import BlockingPortal

from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.logs import event
from tandem_protocol.messages import Prompt, RolloutRequest
from tandem_protocol.version import Version
from tandem_rollout.episode_sampler import EpisodeSampler
from tandem_rollout.prompts import PromptRow
from tandem_rollout.rewards.judge import WinRate
from tandem_rollout.sampler import UNSHAPED, Sampler, sampling
from tandem_rollout.trajectory import Group

from .run.metrics import failures, mean, reward_names, samples

log = logging.getLogger(__name__)


class Evaluation:
    """Evaluates a version each time it is called, and writes one line of `eval.jsonl`.

    The line has the step, the version, and the fields of `evaluation_record`.
    """

    def __init__(
        self,
        *,
        rows: Sequence[PromptRow],
        sampler: Sampler | EpisodeSampler,
        win_rate: WinRate | None,
        portal: BlockingPortal,
        wait: Callable[[Future[list[Group]] | None], list[Group] | None],
        config: TrainerConfig,
        write: Callable[[dict[str, Any]], None],
        is_main: bool,
    ) -> None:
        self._rows = rows
        self._portal = portal
        self._wait = wait
        self._sampler = replace(sampler, scorer=win_rate) if win_rate else sampler
        self._win_rate = win_rate
        self._config = config
        self._write = write
        self._is_main = is_main

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step`: before the first step, after the last, and every `eval.every_steps`."""
        if self._config.eval is None:
            return False
        every_steps = self._config.eval.every_steps
        return step in (0, self._config.max_steps) or (every_steps is not None and step % every_steps == 0)

    def __call__(self, version: Version) -> dict[str, Any] | None:
        """Evaluate a version and return the record. Only the main process does it; the others get None."""
        groups = self._wait(self._portal.start_task_soon(self._collect, version) if self._is_main else None)
        if groups is None:
            return None
        assert self._config.eval is not None, "`due` is True only with trainer.eval"
        record = evaluation_record(groups, self._config.scorers, self._config.eval.pass_at)
        if self._config.rollout.has_episodes:
            record |= self._failed(groups, version)
        self._write({"step": version.step, "version": str(version)} | record)
        return record

    def _failed(self, groups: Sequence[Group], version: Version) -> dict[str, int]:
        """Report the episodes that failed, and return their number for the record."""
        rows = samples(groups, version.step)
        if message := failures(rows):
            log.warning("the evaluation at step %d: %s", version.step, message, extra=event("evaluation_failed"))
        return {"episodes_failed": sum(row.reason is not None for row in rows)}

    async def _collect(self, version: Version) -> list[Group]:
        """Sample and score completions for all rows."""
        assert self._config.eval is not None, "`due` is True only with trainer.eval"
        rollout = self._config.rollout
        temperature = self._config.eval.temperature
        count = self._config.eval.num_generations
        request = RolloutRequest(
            prompts=tuple(
                Prompt(token_ids=row.token_ids, seed=row.index if temperature else None) for row in self._rows
            ),
            sampling=sampling(rollout).model_copy(update={"n": count, "temperature": temperature, **UNSHAPED}),
            min_version=version,
        )
        scored: list[Group] = []

        steps = math.ceil(len(self._rows) * count / (rollout.num_prompts * rollout.num_generations))
        timeout_s = rollout.timeout_s * steps
        await self._sampler.collect(request, self._rows, lambda _, group: scored.append(group), timeout_s=timeout_s)
        if self._win_rate is None:
            return scored
        try:
            return await asyncio.wait_for(self._win_rate(scored, version), timeout_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"the judge did not compare the {len(scored)} groups of the evaluation within {timeout_s:g} s. Fix: "
                "make the judge faster, lower trainer.eval.prompts.limit, or raise trainer.rollout.timeout_s."
            ) from error


def evaluation_record(groups: Sequence[Group], functions: Sequence[str], pass_at: Iterable[int]) -> dict[str, Any]:
    """Return the number of prompts, the mean rewards (total and by name), and pass@k by name.

    A trajectory passes if its reward is 1 or more.
    """
    names = reward_names(functions, (one.rewards for group in groups for one in group.trajectories))
    columns = {name: [[one.rewards.get(name) for one in group.trajectories] for group in groups] for name in names}
    return {
        "n": len(groups),
        "reward_mean": mean(one.reward for group in groups for one in group.trajectories),
        "rewards": {name: mean(reward for rewards in column for reward in rewards) for name, column in columns.items()},
        "pass_at": {
            name: {str(k): statistics.fmean(pass_at_k(rewards, k) for rewards in column) for k in pass_at}
            for name, column in columns.items()
        },
    }


def pass_at_k(rewards: Sequence[float | None], k: int) -> float:
    """Return the probability that at least one of `k` samples, drawn without replacement, has a reward of 1 or more.

    This is an unbiased estimate of the same probability for k new samples.
    Source: Chen et al. 2021, arXiv:2107.03374, equation 1.
    """
    failed = sum(reward is None or reward < 1.0 for reward in rewards)
    return 1.0 - math.comb(failed, k) / math.comb(len(rewards), k)
