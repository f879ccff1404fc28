"""Rollouts ahead of the learner: requested, streamed and scored in the background, and returned oldest first."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from anyio.from_thread import BlockingPortal

from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.manifest import digest_bytes
from tandem_protocol.messages import Group as Answer
from tandem_protocol.messages import Prompt, RolloutRequest, Sampling
from tandem_protocol.version import Version

from .client import GeneratorClient, task_group
from .completions import CompletionReader
from .episode_sampler import EpisodeSampler
from .prompts import Draw, PromptCursor, PromptRow
from .rewards.scoring import Scorer
from .trajectory import Group


@dataclass
class _Pending:
    """The rollouts of one step: the prompts, the groups so far, and the task that gets the missing ones."""

    draws: list[Draw]
    scored: dict[int, Group] = field(default_factory=dict)
    """Position in `draws` → group. The background thread fills it."""
    unscored: dict[int, Group] = field(default_factory=dict)
    """Groups from a checkpoint that have to be scored again, because reward functions or columns have changed."""
    task: Future[None] | None = None


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


class Rollouts:
    """Keeps the rollouts of the next `max_lag + 1` steps in progress.

    For example, with `max_lag` 1 the queue holds the rollouts of the next step and of the step after it. If the next
    training step starts from version v, its rollouts need version v − 1 or newer, and those behind it v or newer. In
    general, the rollouts at place n of the queue need version v + n − max_lag or newer. With `max_lag` 0, rollouts are
    requested only after the newest version is served.
    """

    def __init__(
        self,
        *,
        rows: Sequence[PromptRow],
        cursor: PromptCursor,
        sampler: Sampler | EpisodeSampler,
        portal: BlockingPortal,
        wait: Callable[[Future[None]], object],
        config: RolloutConfig,
        prompts_per_step: int,
        max_lag: int,
    ) -> None:
        self._rows = rows
        self._cursor = cursor
        self._sampler = sampler
        self._portal = portal
        self._wait = wait
        self._config = config
        self._prompts_per_step = prompts_per_step
        self._max_lag = max_lag
        self._queue: deque[_Pending] = deque()
        self._first_version = Version(0, 0)

    def start(self, first_version: Version) -> None:
        """Set the first version that this start of the trainer publishes. Rollouts never come from an older one."""
        self._first_version = first_version

    def next(self, min_version: int) -> list[Group]:
        """Wait for the rollouts of the next step and return them, in the order of their prompts.

        Args:
            min_version: step of the oldest version that may have sampled them.

        Raises:
            TandemError, TimeoutError: the generators did not deliver.
            UserError: a reward function failed.
        """
        while len(self._queue) <= self._max_lag:
            self._queue.append(_Pending(self._cursor.draw(self._prompts_per_step)))
        # The queue is longer if the checkpoint was written with a larger `max_lag`. The rest is requested later.
        for place, pending in enumerate(islice(self._queue, self._max_lag + 1)):
            if pending.task is None:
                # The generators serve the rollouts before it in the queue first.
                timeout_s = self._config.timeout_s * (place + 1)
                pending.task = self._portal.start_task_soon(self._fill, pending, min_version + place, timeout_s)
        head = self._queue[0]
        assert head.task is not None, "started above"
        self._wait(head.task)
        self._queue.popleft()
        return [head.scored[position] for position in range(len(head.draws))]

    async def _fill(self, pending: _Pending, min_version: int, timeout_s: float) -> None:
        """Request and score the groups that `pending` lacks. Groups from a checkpoint that are too old are dropped."""
        pending.scored = {i: group for i, group in pending.scored.items() if group.lag(min_version) <= 0}
        unscored = {i: group for i, group in pending.unscored.items() if group.lag(min_version) <= 0}
        async with task_group() as tasks:
            for position, group in unscored.items():
                tasks.create_task(self._score_again(pending, position, group))
            known = pending.scored.keys() | unscored.keys()
            if missing := [position for position in range(len(pending.draws)) if position not in known]:
                tasks.create_task(self._request(pending, missing, min_version, timeout_s))

    async def _score_again(self, pending: _Pending, position: int, group: Group) -> None:
        row = self._rows[pending.draws[position].row]
        unscored = [one.model_copy(update={"rewards": {}, "reward": None}) for one in group.trajectories]
        trajectories = await self._sampler.scorer.score(row, unscored)
        pending.scored[position] = group.model_copy(update={"trajectories": trajectories})

    async def _request(self, pending: _Pending, missing: list[int], min_version: int, timeout_s: float) -> None:
        """Request and score the groups at the positions `missing`."""
        draws = [pending.draws[position] for position in missing]
        request = RolloutRequest(
            prompts=tuple(Prompt(token_ids=self._rows[draw.row].token_ids, seed=draw.seed) for draw in draws),
            sampling=sampling(self._config),
            min_version=Version(max(min_version, self._first_version.step), self._first_version.attempt),
        )

        def keep(index: int, group: Group) -> None:
            pending.scored[missing[index]] = group

        rows = [self._rows[draw.row] for draw in draws]
        await self._sampler.collect(request, rows, keep, timeout_s=timeout_s)

    def forget_samples(self) -> None:
        """Drop all samples but keep the draws, so that a resumed run samples the same prompts again."""
        for pending in self._queue:
            pending.scored = {}
            pending.unscored = {}

    def close(self) -> None:
        """Cancel all requests in progress."""
        for pending in self._queue:
            if pending.task is not None:
                pending.task.cancel()

    def state_dict(self) -> dict[str, Any]:
        """The cursor and the scored rollouts. A resumed run requests the missing ones again, with the same seeds."""
        return {
            "cursor": self._cursor.position,
            "queue": [
                {
                    "draws": [draw._asdict() for draw in pending.draws],
                    "prompts": [self._digest(draw) for draw in pending.draws],
                    "scored": {i: group.model_dump(mode="json") for i, group in sorted(dict(pending.scored).items())},
                }
                for pending in self._queue
            ],
        }

    def load_state_dict(self, state: dict[str, Any], *, sample_again: bool = False, score_again: bool = False) -> None:
        """Restore what `state_dict` returned.

        Args:
            sample_again: request all completions again, because sampling options have changed.
            score_again: score all completions again, because reward functions or columns have changed. Episodes are
                requested again.
        """
        sample_again |= score_again and not self._sampler.can_score_again
        self._cursor.position = state["cursor"]
        self._queue.clear()
        for saved in state["queue"]:
            pending = _Pending(draws=[Draw(**draw) for draw in saved["draws"]])
            groups = {int(i): Group.model_validate(group) for i, group in saved["scored"].items()}
            # The prompts or the chat template may have been edited.
            valid = {i: group for i, group in groups.items() if saved["prompts"][i] == self._digest(pending.draws[i])}
            if score_again and not sample_again:
                pending.unscored = valid
            elif not sample_again:
                pending.scored = valid
            self._queue.append(pending)

    def _digest(self, draw: Draw) -> str:
        """Digest of the prompt's tokens."""
        return digest_bytes(json.dumps(self._rows[draw.row].token_ids).encode())
