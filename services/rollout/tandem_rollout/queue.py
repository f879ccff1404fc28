"""Rollouts ahead of the learner: requested, streamed and scored in the background, and handed out when ready."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Any

from anyio.from_thread import BlockingPortal

from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.errors import EngineFailed, TandemError
from tandem_protocol.manifest import digest_bytes
from tandem_protocol.messages import Prompt, RolloutRequest
from tandem_protocol.version import Version

from .episode_sampler import EpisodeSampler
from .pool import Counts, Pool, Slot
from .prompts import Draw, PromptCursor, PromptRow
from .sampler import Sampler, sampling
from .tasks import task_group
from .trajectory import Group


class Rollouts:
    """Keeps `max_lag + 1` batches of groups in progress, and hands out those that have finished.

    For example, with `max_lag` 1 and 16 prompts per step, 32 groups are in progress. The next step gets the first 16
    that finish, and 16 further rows are asked for. A group whose oldest token is more than `max_lag` versions old when
    it has finished is asked for again. With `max_lag` 0, groups are requested only after the newest version is served,
    in one request, and a step gets them in the order of their prompts.
    """

    def __init__(
        self,
        *,
        rows: Sequence[PromptRow],
        cursor: PromptCursor,
        sampler: Sampler | EpisodeSampler,
        portal: BlockingPortal,
        wait: Callable[[Future[list[Slot]]], object],
        config: RolloutConfig,
        prompts_per_step: int,
        max_lag: int,
        switches_abort: bool = False,
        until_served: Callable[[Version], Awaitable[object]] | None = None,
    ) -> None:
        """
        Args:
            switches_abort: see `Pool`.
            until_served: waits while a version is being published. That time does not count for the deadlines.
        """
        self._rows = rows
        self._cursor = cursor
        self._sampler = sampler
        self._portal = portal
        self._wait = wait
        self._until_served = until_served
        self._config = config
        self._prompts_per_step = prompts_per_step
        self._max_lag = max_lag
        self._pool = Pool(prompts_per_step, max_lag, refill=config.refill, switches_abort=switches_abort)
        self._lock = Lock()
        """Held while the cursor or the slots of the pool change, so that a checkpoint sees both before or after."""
        self._first_version = Version(0, 0)
        self._progress = asyncio.Event()
        """Set when a request has ended."""

    def start(self, first_version: Version) -> None:
        """Set the first version that this start of the trainer publishes. Rollouts never come from an older one."""
        self._first_version = first_version

    def next(self, min_version: int) -> list[Group]:
        """Wait for the groups of the next step and return them, in the order of their draws.

        Every call hands out other groups. Those of the last call stay in `state_dict` until `learned` or the next call.

        Args:
            min_version: step of the oldest version that may have sampled them.

        Raises:
            TandemError, TimeoutError: the generators did not deliver.
            UserError: a reward function failed.
        """
        with self._lock:
            self._pool.forget_handed()
        task = self._portal.start_task_soon(self._next, min_version + self._max_lag)
        self._wait(task)
        batch = task.result()
        with self._lock:
            self._pool.hand_out(batch)
        return [slot.group for slot in batch if slot.group]

    def learned(self) -> Counts:
        """Forget the groups of the last `next`, because a step has learned from them. Returns the step's counts."""
        with self._lock:
            self._pool.forget_handed()
            return self._pool.take_counts()

    async def _next(self, step: int) -> list[Slot]:
        """Return the slots that the step which starts from version `step` learns from."""
        while (batch := self._advance(step)) is None:
            await self._progress.wait()
            self._progress.clear()
        return batch

    def _advance(self, step: int) -> list[Slot] | None:
        """Ask for what is missing now, and return the step's slots if they are there."""
        with self._lock:
            self._pool.update(step, self._cursor.draw)
        open_ = self._pool.to_ask(step)
        for together in [open_] if self._max_lag == 0 else [[slot] for slot in open_]:
            self._ask(together, step)
        for slot in self._pool.slots:
            if slot.error:
                raise slot.error
        return self._pool.batch(step)

    def _ask(self, slots: Sequence[Slot], step: int) -> None:
        """Start the task that gets the groups of `slots`."""
        if not slots:
            return
        # The generators serve the groups that were asked for earlier first.
        earlier = [slot for slot in self._pool.slots if slot.task is not None and slot.group is None]
        place = len(earlier) // self._prompts_per_step
        task = asyncio.create_task(self._fill(slots, step, self._config.timeout_s * (place + 1)))
        for slot in slots:
            slot.task, slot.asked_at = task, step

    async def _fill(self, slots: Sequence[Slot], step: int, timeout_s: float) -> None:
        """Request and score the groups that `slots` lack. `next` raises the error if that fails."""
        try:
            async with task_group() as tasks:
                for slot in slots:
                    if slot.unscored:
                        tasks.create_task(self._score_again(slot, slot.unscored))
                if missing := [slot for slot in slots if not slot.unscored]:
                    tasks.create_task(self._request(missing, step, timeout_s))
        except (Exception, BaseExceptionGroup) as error:
            for slot in slots:
                slot.error = error if isinstance(error, Exception) else EngineFailed(str(error.exceptions[0]))
        finally:
            for slot in slots:
                if slot.group is None and slot.task is asyncio.current_task():
                    slot.error = slot.error or EngineFailed(
                        "the request has ended without all groups. A function of the project may have cancelled it."
                    )
            self._progress.set()

    async def _score_again(self, slot: Slot, group: Group) -> None:
        row = self._rows[slot.draw.row]
        unscored = [one.model_copy(update={"rewards": {}, "reward": None}) for one in group.trajectories]
        trajectories = await self._sampler.scorer.score(row, unscored)
        slot.put(group.model_copy(update={"trajectories": trajectories}))

    async def _request(self, slots: Sequence[Slot], step: int, timeout_s: float) -> None:
        """Request and score the groups of `slots` from the newest version."""
        version = Version(max(step, self._first_version.step), self._first_version.attempt)
        if self._until_served is not None:
            await self._until_served(version)
        rows = [self._rows[slot.draw.row] for slot in slots]
        request = RolloutRequest(
            prompts=tuple(
                Prompt(token_ids=row.token_ids, seed=slot.draw.seed) for row, slot in zip(rows, slots, strict=True)
            ),
            sampling=sampling(self._config),
            min_version=version,
        )

        def keep(index: int, group: Group) -> None:
            if group.lag(step) > 0:
                raise TandemError(
                    f"got tokens of version {group.oldest_version}, expected step {step} or newer. Another trainer "
                    "publishes to these generators. Fix: stop it, or give it generators of its own."
                )
            slots[index].put(group)

        await self._sampler.collect(request, rows, keep, timeout_s=timeout_s)

    def forget_samples(self) -> None:
        """Drop all samples but keep the draws, so that a resumed run samples the same prompts again."""
        self.close()  # otherwise more samples would arrive
        with self._lock:
            self._pool.slots = [Slot(slot.draw, too_old_at=slot.too_old_at) for slot in self._pool.slots]

    def close(self) -> None:
        """Cancel all requests in progress."""
        if tasks := [slot.task for slot in self._pool.slots if slot.task]:
            self._portal.start_task_soon(self._cancel, tasks)

    async def _cancel(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()

    def state_dict(self) -> dict[str, Any]:
        """The cursor and the slots. A resumed run requests the missing groups again, with the same seeds."""
        with self._lock:
            cursor, counts = self._cursor.position, self._pool.counts
            # `unscored` is read first: a group that is scored meanwhile is found in one of the two.
            slots = [(slot.draw, slot.unscored, slot.group, slot.too_old_at) for slot in self._pool.slots]
        saved = {
            "draws": [draw._asdict() for draw, *_ in slots],
            "prompts": [self._digest(draw) for draw, *_ in slots],
            "scored": {i: group.model_dump(mode="json") for i, (_, _, group, _) in enumerate(slots) if group},
            "unscored": {
                i: unscored.model_dump(mode="json")
                for i, (_, unscored, group, _) in enumerate(slots)
                if unscored and not group
            },
            "too_old_at": {i: step for i, (*_, step) in enumerate(slots) if step is not None},
        }
        return {"cursor": cursor, "queue": [saved], "counts": counts._asdict()}

    def load_state_dict(self, state: dict[str, Any], *, sample_again: bool = False, score_again: bool = False) -> None:
        """Restore what `state_dict` returned. Earlier releases saved a list of batches; they are joined.

        Args:
            sample_again: request all completions again, because sampling options have changed.
            score_again: score all completions again, because reward functions or columns have changed. Episodes are
                requested again.
        """
        sample_again |= score_again and not self._sampler.can_score_again
        self._cursor.position = state["cursor"]
        self._pool.counts = Counts(**state.get("counts", {}))
        self._pool.slots = [slot for batch in state["queue"] for slot in self._slots(batch)]
        for slot in self._pool.slots:
            if sample_again:
                slot.forget()
            elif score_again and slot.group:
                slot.put(slot.group, scored=False)

    def _slots(self, saved: dict[str, Any]) -> list[Slot]:
        """Restore the slots of a batch, with the groups that are still valid."""
        slots = [Slot(Draw(**draw)) for draw in saved["draws"]]
        for i, step in saved.get("too_old_at", {}).items():
            slots[int(i)].too_old_at = step
        for scored, groups in ((True, saved["scored"]), (False, saved.get("unscored", {}))):
            for i, group in groups.items():
                slot = slots[int(i)]
                if saved["prompts"][int(i)] == self._digest(slot.draw):  # else the prompt or the template was edited
                    slot.put(Group.model_validate(group), scored=scored)
        return slots

    def _digest(self, draw: Draw) -> str:
        """Digest of the prompt's tokens."""
        return digest_bytes(json.dumps(self._rows[draw.row].token_ids).encode())
