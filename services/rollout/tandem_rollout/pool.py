"""The groups between the draw of their row and the step that learns from them: which are asked for, and which are next.

Nothing here waits or sends anything. `queue.py` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .prompts import Draw
from .trajectory import Group

REFILL_BATCHES = 10
"""A step replaces at most this many batches of groups without signal. Then it takes groups as they come."""
PATIENCE = 4
"""Groups that were too old are asked for again together, at the latest after PATIENCE × (`max_lag` + 1) steps."""


@dataclass(eq=False)
class Slot:
    """One group, from the draw of its row until a step has learned from it."""

    draw: Draw
    group: Group | None = None
    """The scored group."""
    unscored: Group | None = None
    """A group from a checkpoint that has to be scored again, because reward functions or columns have changed."""
    oldest_step: int | None = None
    """Step of the oldest version that sampled a token of the group. None for a slot without a group or tokens."""
    has_signal: bool = False
    """See `Group.has_signal`. It is kept here, because the pool looks at all groups each time that one finishes."""
    too_old_at: int | None = None
    """The step at which an earlier group of this slot was too old. A step then waits for the next one."""
    asked_at: int | None = None
    """The step that asked for the group. None: it is not asked for."""
    task: asyncio.Task[None] | None = None
    """Gets the group."""
    error: Exception | None = None
    """Why `task` failed."""

    @property
    def is_open(self) -> bool:
        """Whether the group has to be asked for."""
        return self.group is None and self.task is None

    @property
    def is_idle(self) -> bool:
        """Whether no task is about to put a group here."""
        return self.group is not None or self.task is None

    def put(self, group: Group, *, scored: bool = True) -> None:
        """Keep a group. The background thread calls it."""
        oldest = group.oldest_version
        self.oldest_step = oldest.step if oldest else None
        self.has_signal = group.has_signal
        self.group, self.unscored = (group, None) if scored else (None, group)

    def forget(self) -> None:
        """Drop the group, which has to be asked for again."""
        self.group = self.unscored = self.oldest_step = self.asked_at = self.task = None

    def lag(self, step: int) -> int:
        """By how many versions the group's oldest token is older than `step`."""
        return 0 if self.oldest_step is None else step - self.oldest_step


class Counts(NamedTuple):
    """What happened to the groups besides that steps learned from them."""

    refilled: int = 0
    """Groups without signal that were replaced by a further prompt."""
    reasked: int = 0
    """Groups that were too old and asked for again."""


class Pool:
    """The slots of one rank, in the order of their draws. It holds `max_lag + 1` batches.

    With `max_lag` 0, a step gets the slots in their order. Otherwise it gets those that have finished, oldest version
    first.
    """

    def __init__(self, batch_size: int, max_lag: int, *, refill: bool, switches_abort: bool = False) -> None:
        """
        Args:
            switches_abort: a new version ends the groups that are being sampled, and they begin again. A step then
                waits for all groups that were asked for `max_lag` steps ago, because no version is published meanwhile.
        """
        self.slots: list[Slot] = []
        self.counts = Counts()
        self._batch_size = batch_size
        self._max_lag = max_lag
        self._capacity = (max_lag + 1) * batch_size
        self._max_refills = REFILL_BATCHES * batch_size if refill else 0
        self._switches_abort = switches_abort
        self._handed: Sequence[Slot] = ()

    def hand_out(self, slots: Sequence[Slot]) -> None:
        """A step learns from `slots`. They stay until `forget_handed`, so that a checkpoint has them if it fails."""
        self._handed = slots

    def forget_handed(self) -> None:
        """The step has learned from its slots, or skipped them."""
        self.slots = [slot for slot in self.slots if slot not in self._handed]
        self._handed = ()

    def take_counts(self) -> Counts:
        """Return the counts since the last call."""
        counts, self.counts = self.counts, Counts()
        return counts

    def update(self, step: int, draw: Callable[[int], Sequence[Draw]]) -> None:
        """Drop groups that `step` cannot use, and fill the pool with further rows."""
        self._drop_without_signal()  # first: one that is too old as well is replaced, not asked for again
        for slot in self.slots:
            if slot.is_idle and slot.lag(step) > self._max_lag:
                slot.forget()
                slot.too_old_at = step
                self.counts = self.counts._replace(reasked=self.counts.reasked + 1)
        self.slots += map(Slot, draw(max(0, self._capacity - len(self.slots))))

    def _drop_without_signal(self) -> None:
        left = self._max_refills - self.counts.refilled
        finished = [slot for slot in self._first() if slot.group is not None] if left > 0 else []
        if self._max_lag == 0 and len(finished) < self._batch_size:
            return  # which groups are replaced must not depend on the order in which they finish
        dropped = [slot for slot in finished if not slot.has_signal][:left]
        self.slots = [slot for slot in self.slots if slot not in dropped]
        self.counts = self.counts._replace(refilled=self.counts.refilled + len(dropped))

    def to_ask(self, step: int) -> list[Slot]:
        """Return the slots to ask for now.

        A step waits for groups that are asked for again. So they are asked for together, and one step waits for many.
        """
        slots = [slot for slot in self._first() if slot.is_open]
        again = [slot for slot in slots if slot.too_old_at is not None]
        if not again or self._max_lag == 0 or self._is_time_for(again, step):
            return self._without_excess(slots, step)
        return [slot for slot in slots if slot.too_old_at is None]

    def _is_time_for(self, again: Sequence[Slot], step: int) -> bool:
        """Whether half a batch has to be asked for again, or one has waited for long, or nothing else is left."""
        since = min(slot.too_old_at for slot in again if slot.too_old_at is not None)
        return (
            2 * len(again) >= self._batch_size
            or step - since >= PATIENCE * (self._max_lag + 1)
            or len(self._first()) - len(again) < self._batch_size
        )

    def _without_excess(self, slots: Sequence[Slot], step: int) -> list[Slot]:
        """Leave out slots that are asked for again if a later step would have to wait for more than a batch of them."""
        asked = [slot for slot in self.slots if slot.too_old_at is not None and slot.asked_at == step]
        room = self._batch_size - len(asked)
        again = [slot for slot in slots if slot.too_old_at is not None][: max(0, room)]
        return [slot for slot in slots if slot.too_old_at is None or slot in again]

    def batch(self, step: int) -> list[Slot] | None:
        """Return the slots that `step` learns from, in the order of their draws. None if it has to wait."""
        awaited = self._awaited(step)
        others = [slot for slot in self._first() if slot.group is not None and slot not in awaited]
        # Those without signal are here if `update` has replaced too many. It replaces them for the next step.
        others.sort(key=lambda slot: (bool(self._max_refills) and not slot.has_signal, -slot.lag(step)))
        chosen = [*awaited, *others][: self._batch_size]
        if len(chosen) < self._batch_size or any(slot.group is None for slot in awaited):
            return None
        return [slot for slot in self.slots if slot in chosen]

    def _awaited(self, step: int) -> list[Slot]:
        """The slots that `step` waits for. Without them, a long group would be too old, or aborted, again and again."""
        if self._max_lag == 0:
            return self._first()
        slots = [slot for slot in self.slots if self._switches_abort or slot.too_old_at is not None]
        return [slot for slot in slots if slot.asked_at is not None and step - slot.asked_at >= self._max_lag]

    def _first(self) -> list[Slot]:
        """The slots that are asked for now. There are more if the checkpoint was written with a larger `max_lag`."""
        return self.slots[: self._capacity]
