"""Rollouts ahead of the learner: asked for, streamed and scored in the background, handed out oldest first."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from anyio.from_thread import BlockingPortal

from tandem_protocol.messages import Group, Prompt, RolloutRequest, Sampling
from tandem_protocol.version import Version

from .batch import ScoredGroup, oldest_step
from .client import GeneratorClient, task_group
from .config import RolloutConfig
from .prompts import Draw, PromptCursor, PromptRow
from .rewards import Scorer


@dataclass
class _Pending:
    """The rollouts of one step: what was drawn, what is scored, and the task that sees to the rest."""

    draws: list[Draw]
    scored: dict[int, ScoredGroup] = field(default_factory=dict)
    """By position in `draws`; filled by the background thread."""
    unscored: dict[int, Group] = field(default_factory=dict)
    """Groups of a resumed run, whose rewards are of other functions or columns than today's."""
    task: Future[None] | None = None


UNSHAPED: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""The values with which the generator samples from the policy itself."""


def sampling(config: RolloutConfig) -> Sampling:
    """What the generator is asked for in training."""
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


async def collect(
    client: GeneratorClient,
    rewards: Scorer,
    request: RolloutRequest,
    rows: Sequence[PromptRow],
    keep: Callable[[int, ScoredGroup], object],
    *,
    timeout_s: float,
) -> None:
    """Ask for `request`, whose prompts are `rows`, score each group as it arrives and `keep` it by its index.

    Raises:
        TimeoutError: groups are missing after `timeout_s`, or rewards another `timeout_s` after the last group.
        TandemError, UserError: a generator refused, or a reward function failed.
    """

    async def score(group: Group) -> None:
        keep(group.prompt_index, await rewards.score(rows[group.prompt_index], group))

    async with task_group() as scoring:
        tasks: list[asyncio.Task[None]] = []
        await client.rollouts(
            request, lambda group: tasks.append(scoring.create_task(score(group))), timeout_s=timeout_s
        )
        _, late = await asyncio.wait(tasks, timeout=timeout_s)
        if late:
            raise TimeoutError(
                f"{len(late)} of {len(tasks)} groups are not scored {timeout_s:g} s after the last one arrived; the "
                "reward functions are slow or hang. Fix them, or raise trainer.rollout.timeout_s."
            )


class Rollouts:
    """Keeps the rollouts of `max_lag + 1` steps under way.

    The queue's head is trained on at the next step s, what stands n places behind it n steps later; its policy may then
    be `max_lag` versions old, so it may come from version s + n − max_lag on. Hence with `max_lag` 0 nothing is asked
    for before the newest version serves.
    """

    def __init__(
        self,
        *,
        rows: Sequence[PromptRow],
        cursor: PromptCursor,
        client: GeneratorClient,
        rewards: Scorer,
        portal: BlockingPortal,
        wait: Callable[[Future[None]], None],
        config: RolloutConfig,
        prompts_a_step: int,
        max_lag: int,
    ) -> None:
        self._rows, self._cursor = rows, cursor
        self._client, self._rewards, self._portal, self._wait = client, rewards, portal, wait
        self._config, self._prompts_a_step, self._max_lag = config, prompts_a_step, max_lag
        self._queue: deque[_Pending] = deque()
        self._first = Version(0, 0)

    def start(self, first: Version) -> None:
        """Say which version this incarnation of the trainer publishes first; nothing older is asked for."""
        self._first = first

    def next(self, min_version: int) -> list[ScoredGroup]:
        """The scored groups of the next step, in the order of their prompts, none older than step `min_version`.

        Consumes the queue's head. Waits for its task, which ends by itself at its deadline.

        Raises:
            TandemError, TimeoutError: the generators did not deliver.
            UserError: a reward function failed.
        """
        while len(self._queue) <= self._max_lag:
            self._queue.append(_Pending(self._cursor.draw(self._prompts_a_step)))
        # A queue that was filled with a larger `max_lag` is longer; its end waits for its turn.
        for place, pending in enumerate(islice(self._queue, self._max_lag + 1)):
            if pending.task is None:
                # What stands before it in the queue takes its time first.
                timeout_s = self._config.timeout_s * (place + 1)
                pending.task = self._portal.start_task_soon(self._fill, pending, min_version + place, timeout_s)
        head = self._queue[0]
        assert head.task is not None, "asked for above"
        self._wait(head.task)
        self._queue.popleft()
        return [head.scored[position] for position in range(len(head.draws))]

    async def _fill(self, pending: _Pending, min_version: int, timeout_s: float) -> None:
        """Ask for and score what `pending` lacks; groups that a resumed run brings along may have grown too old."""
        pending.scored = {i: group for i, group in pending.scored.items() if group.oldest_step >= min_version}
        unscored = {i: group for i, group in pending.unscored.items() if oldest_step(group) >= min_version}
        async with task_group() as tasks:
            for position, group in unscored.items():
                tasks.create_task(self._score_again(pending, position, group))
            known = pending.scored.keys() | unscored.keys()
            if missing := [position for position in range(len(pending.draws)) if position not in known]:
                tasks.create_task(self._ask(pending, missing, min_version, timeout_s))

    async def _score_again(self, pending: _Pending, position: int, group: Group) -> None:
        row = self._rows[pending.draws[position].row]
        pending.scored[position] = await self._rewards.score(row, group)

    async def _ask(self, pending: _Pending, missing: list[int], min_version: int, timeout_s: float) -> None:
        """Ask for the groups at the positions `missing`, and score them."""
        draws = [pending.draws[position] for position in missing]
        request = RolloutRequest(
            prompts=tuple(Prompt(token_ids=self._rows[draw.row].token_ids, seed=draw.seed) for draw in draws),
            sampling=sampling(self._config),
            min_version=Version(max(min_version, self._first.step), self._first.attempt),
        )

        def keep(index: int, group: ScoredGroup) -> None:
            pending.scored[missing[index]] = group

        rows = [self._rows[draw.row] for draw in draws]
        await collect(self._client, self._rewards, request, rows, keep, timeout_s=timeout_s)

    def forget_samples(self) -> None:
        """Drop what was sampled; a resumed run asks for it again."""
        for pending in self._queue:
            pending.scored, pending.unscored = {}, {}

    def close(self) -> None:
        """Give up whatever is under way."""
        for pending in self._queue:
            if pending.task is not None:
                pending.task.cancel()

    def state_dict(self) -> dict[str, Any]:
        """The cursor and the rollouts in hand. What is in flight is asked for again with the same seeds on resume."""
        return {
            "cursor": self._cursor.position,
            "queue": [
                {
                    "draws": [draw._asdict() for draw in pending.draws],
                    "scored": {i: group.model_dump(mode="json") for i, group in sorted(dict(pending.scored).items())},
                }
                for pending in self._queue
            ],
        }

    def load_state_dict(self, state: dict[str, Any], *, sample_again: bool = False, score_again: bool = False) -> None:
        """Go on from what `state_dict` gave.

        Args:
            sample_again: Completions would come from another distribution now, so ask for all of them again.
            score_again: Reward functions or columns have changed, so call the functions of today.
        """
        self._cursor.position = state["cursor"]
        self._queue.clear()
        for saved in state["queue"]:
            pending = _Pending(draws=[Draw(**draw) for draw in saved["draws"]])
            groups = {int(i): ScoredGroup.model_validate(group) for i, group in saved["scored"].items()}
            # The prompts may have been edited, or the chat template.
            valid = {i: group for i, group in groups.items() if self._is_prompt_of(group, pending.draws[i])}
            if score_again and not sample_again:
                pending.unscored = {i: group.group for i, group in valid.items()}
            elif not sample_again:
                pending.scored = valid
            self._queue.append(pending)

    def _is_prompt_of(self, group: ScoredGroup, draw: Draw) -> bool:
        return group.prompt_ids == self._rows[draw.row].token_ids
