"""How good the policy is on held-out prompts: completions through the generator, scored as in training.

With a judge, the reward is the rate of wins against the first policy that the run evaluated.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from anyio.from_thread import BlockingPortal

from tandem_protocol.messages import Prompt, RolloutRequest
from tandem_protocol.version import Version

from .batch import ScoredGroup
from .client import GeneratorClient
from .config import TrainerConfig
from .judge import WinRate
from .metrics import JsonLinesWriter, mean
from .prompts import PromptRow
from .rewards import Scorer
from .rollouts import UNSHAPED, collect, sampling


class Evaluation:
    """Appends one line to `eval.jsonl` each time it is called: step, version, `evaluation_record`."""

    def __init__(
        self,
        *,
        rows: Sequence[PromptRow],
        client: GeneratorClient,
        rewards: Scorer,
        win_rate: WinRate | None,
        portal: BlockingPortal,
        wait: Callable[[Future[list[ScoredGroup]]], list[ScoredGroup]],
        config: TrainerConfig,
        file: Path,
        is_main: bool,
    ) -> None:
        self._rows, self._client, self._portal, self._wait = rows, client, portal, wait
        self._rewards, self._win_rate = rewards, win_rate
        self._config, self._file, self._is_main = config, JsonLinesWriter(file), is_main

    def due(self, step: int) -> bool:
        """Before the first step, after the last, and every `eval.every_steps`."""
        if self._config.eval is None:
            return False
        every_steps = self._config.eval.every_steps
        return step in (0, self._config.max_steps) or (every_steps is not None and step % every_steps == 0)

    def __call__(self, version: Version) -> dict[str, Any] | None:
        """The figures. Main process only; the others go on to the next thing that all do together."""
        if not self._is_main:
            return None
        assert self._config.eval is not None, "due says so"
        groups = self._wait(self._portal.start_task_soon(self._collect, version))
        record = evaluation_record(groups, self._config.scorers, self._config.eval.pass_at)
        self._file.forget_after(version.step - 1)
        self._file.append([{"step": version.step, "version": str(version)} | record])
        return record

    async def _collect(self, version: Version) -> list[ScoredGroup]:
        assert self._config.eval is not None, "due says so"
        rollout, temperature = self._config.rollout, self._config.eval.temperature
        count = self._config.eval.num_generations
        request = RolloutRequest(
            prompts=tuple(
                Prompt(token_ids=row.token_ids, seed=row.index if temperature else None) for row in self._rows
            ),
            sampling=sampling(rollout).model_copy(update={"n": count, "temperature": temperature, **UNSHAPED}),
            min_version=version,
        )
        scored: list[ScoredGroup] = []

        steps = math.ceil(len(self._rows) * count / (rollout.num_prompts * rollout.num_generations))
        timeout_s = rollout.timeout_s * steps
        await collect(
            self._client,
            self._win_rate or self._rewards,
            request,
            self._rows,
            lambda _, group: scored.append(group),
            timeout_s=timeout_s,
        )
        if self._win_rate is None:
            return scored
        try:
            return await asyncio.wait_for(self._win_rate(scored, version), timeout_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"the judge has not compared {len(scored)} completions of the evaluation within {timeout_s:g} s; fix "
                "it, make trainer.eval.prompts.limit smaller, or raise trainer.rollout.timeout_s."
            ) from error


def evaluation_record(
    groups: Sequence[ScoredGroup], functions: Sequence[str], pass_at: Iterable[int]
) -> dict[str, Any]:
    """Prompts `n`, mean rewards in all and of each function, and each function's pass@k, where 1 or more is a pass."""
    columns = {name: [group.rewards_by_function[name] for group in groups] for name in functions}
    return {
        "n": len(groups),
        "reward_mean": mean(reward for group in groups for reward in group.rewards),
        "rewards": {name: mean(reward for rewards in column for reward in rewards) for name, column in columns.items()},
        "pass_at": {
            name: {str(k): statistics.fmean(pass_at_k(rewards, k) for rewards in column) for k in pass_at}
            for name, column in columns.items()
        },
    }


def pass_at_k(rewards: Sequence[float | None], k: int) -> float:
    """How probable it is that one of `k` of these samples, drawn without replacement, has a reward of 1 or more.

    Unbiased for the probability that one of k fresh samples has.
    Source: Chen et al. 2021, arXiv:2107.03374, equation 1.
    """
    failed = sum(reward is None or reward < 1.0 for reward in rewards)
    return 1.0 - math.comb(failed, k) / math.comb(len(rewards), k)
