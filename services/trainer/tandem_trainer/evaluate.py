"""How good the policy is on held-out prompts: greedy completions through the generator, scored as in training.

With a judge, the reward is the rate of wins against the first policy that the run evaluated.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

from anyio.from_thread import BlockingPortal

from tandem_protocol.messages import Prompt, RolloutRequest
from tandem_protocol.version import Version

from .batch import ScoredGroup
from .client import GeneratorClient
from .config import TrainerConfig
from .judge import WinRate
from .metrics import JsonLines, mean
from .prompts import PromptRow
from .rewards import Scorer
from .rollouts import collect, sampling


class Evaluation:
    """Appends one line to `eval.jsonl` each time it is called: step, version, n, mean rewards."""

    def __init__(
        self,
        *,
        rows: Sequence[PromptRow],
        client: GeneratorClient,
        rewards: Scorer,
        win_rate: WinRate | None,
        portal: BlockingPortal,
        config: TrainerConfig,
        file: Path,
        is_main: bool,
    ) -> None:
        self._rows, self._client, self._portal = rows, client, portal
        self._rewards, self._win_rate = rewards, win_rate
        self._config, self._file, self._is_main = config, JsonLines(file), is_main

    def due(self, step: int) -> bool:
        """Before the first step, after the last, and every `eval.every_steps`."""
        if self._config.eval is None:
            return False
        every_steps = self._config.eval.every_steps
        return step in (0, self._config.max_steps) or (every_steps is not None and step % every_steps == 0)

    def __call__(self, version: Version) -> None:
        """Main process only; the others go on to the next thing that all do together."""
        if not self._is_main:
            return
        groups = self._portal.call(self._collect, version)
        names = self._config.scorers
        record = {
            "step": version.step,
            "version": str(version),
            "n": len(groups),
            "reward_mean": mean(group.rewards[0] for group in groups),
            "rewards": {name: mean(group.rewards_by_function[name][0] for group in groups) for name in names},
        }
        self._file.forget_after(version.step - 1)
        self._file.append([record])

    async def _collect(self, version: Version) -> list[ScoredGroup]:
        rollout = self._config.rollout
        request = RolloutRequest(
            prompts=tuple(Prompt(token_ids=row.token_ids) for row in self._rows),
            sampling=sampling(rollout).model_copy(
                update={"n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
            ),
            min_version=version,
        )
        scored: list[ScoredGroup] = []

        steps = math.ceil(len(self._rows) / (rollout.num_prompts * rollout.num_generations))
        timeout_s = rollout.timeout_s * steps
        await collect(
            self._client,
            self._rewards,
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
                f"the judge has not compared {len(scored)} completions of the evaluation within {timeout_s:g} s; mend "
                "it, make trainer.eval.prompts.limit smaller, or raise trainer.rollout.timeout_s."
            ) from error
