"""Score trajectories with a judge function of the user's project, and measure the win rate against the first policy."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem_protocol.manifest import digest_bytes
from tandem_protocol.version import Version

from ..calls import ProjectFunction, in_process
from ..functions import CallFailed, load_function, plain
from ..prompts import PromptRow
from ..tasks import task_group
from ..trajectory import Group, Trajectory
from .scoring import as_in_prompt

log = logging.getLogger(__name__)

TIE = 0.5
"""Reward of both completions if neither is better."""


class Judge:
    """Scores pairs of trajectories: 1 for the better one, 0 for the other, 0.5 for both if neither is better."""

    def __init__(self, name: str, *, drop_errors: bool, timeout_s: float) -> None:
        """Load the function. `timeout_s` is the deadline of one call.

        Raises:
            UserError: the function does not exist or cannot be imported.
        """
        function = load_function("judge", name)
        call = in_process(function, timeout_s, asyncio.Lock())
        self._function = ProjectFunction("judge", name, function, call, check_choices, drop_errors=drop_errors)

    def check_parameters(self, rows: Sequence[PromptRow]) -> None:
        """Check that the function accepts the columns of these rows.

        Raises:
            UserError: it does not; names the row and the parameter.
        """
        self._function.check_parameters(rows, ("prompts", "completions"))

    async def score(
        self, row: PromptRow, trajectories: Sequence[Trajectory], environments: Sequence[Any] = ()
    ) -> tuple[Trajectory, ...]:
        """See `Scorer`. A pair of which one failed gets no rewards."""
        del environments  # judges compare what was said
        wins = None
        if all(trajectory.status != "failed" for trajectory in trajectories):
            wins = await self.wins(row, as_in_prompt(row, trajectories))
        return self.judged(trajectories, (None, None) if wins is None else (wins, 1 - wins))

    def judged(self, trajectories: Sequence[Trajectory], rewards: Sequence[float | None]) -> tuple[Trajectory, ...]:
        """Return the trajectories with these rewards. Those of an environment are only reported: the judge decides."""
        pairs = zip(trajectories, rewards, strict=True)
        name = self._function.name
        return tuple(
            one.model_copy(update={"reward": reward, "rewards": one.rewards | {name: reward}}) for one, reward in pairs
        )

    async def wins(self, row: PromptRow, completions: Sequence[Any]) -> float | None:
        """Return 1 if the first of two completions is better, 0 if the second is, 0.5 if neither is.

        Returns None if the judge failed and errors are dropped.
        """
        choices = await self._function(row, 1, completions=[copy.deepcopy(list(completions))])
        if choices is None:
            return None
        choice = choices[0]
        if choice is None:
            return TIE
        return 1.0 - choice


class WinRate:
    """Rewards each trajectory by comparing it with the first evaluated policy's trajectory for the same row.

    The reward is 1 for a win, 0.5 for a tie, 0 for a loss. The mean is the win rate.
    """

    def __init__(self, judge: Judge, rows: Sequence[PromptRow], file: Path) -> None:
        """
        Args:
            file: stores the first policy's completions for the rest of the run.
        """
        self._judge = judge
        self._file = file
        self._rows = {row.index: row for row in rows}
        self._first: dict[str, Sequence[Any]] | None = None
        """The first policy's completions, if they could not be written."""

    async def score(
        self, row: PromptRow, trajectories: Sequence[Trajectory], environments: Sequence[Any] = ()
    ) -> tuple[Trajectory, ...]:
        """See `Scorer`. The rewards are still None; `__call__` adds them when all groups have arrived."""
        del row, environments
        return self._judge.judged(trajectories, (None,) * len(trajectories))

    async def __call__(self, groups: Sequence[Group], version: Version) -> list[Group]:
        """Return the groups with rewards. For the first policy, every comparison is a tie.

        Raises:
            UserError: the judge failed, and errors are not dropped.
        """
        rows = [self._rows[group.row] for group in groups]
        keys = _keys(rows)
        if version.step == 0 or (self._first is None and not self._file.exists()):
            pairs = zip(rows, groups, strict=True)
            self._first = {keys[row.index]: as_in_prompt(row, group.trajectories) for row, group in pairs}
        if self._first is not None:
            self._write_first(self._first)
        first = self._first if self._first is not None else json.loads(self._file.read_text())
        async with task_group() as judging:
            tasks = [judging.create_task(self._against(group, first.get(keys[group.row], ()))) for group in groups]
        return [task.result() for task in tasks]

    def _write_first(self, first: dict[str, Sequence[Any]]) -> None:
        """Write the first policy's completions. On a full disk they stay in memory until the next evaluation."""
        temporary = self._file.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(first))
            temporary.replace(self._file)
            self._first = None
        except OSError as error:
            log.warning("%s cannot be written: %s. The next evaluation tries again.", self._file.name, error)

    async def _against(self, group: Group, first: Sequence[Any]) -> Group:
        """Compare the completions one by one. A reward is None if the first policy has no completion for it."""
        row = self._rows[group.row]
        completions = as_in_prompt(row, group.trajectories)
        pairs = itertools.zip_longest(completions, first[: len(completions)])
        rewards = [await self._rate(row, completion, first_one) for completion, first_one in pairs]
        return group.model_copy(update={"trajectories": self._judge.judged(group.trajectories, rewards)})

    async def _rate(self, row: PromptRow, completion: Any, first: Any) -> float | None:
        """Return the mean over both orders, because many judges prefer the completion that comes first."""
        if first is None:
            return None
        if first == completion:
            return TIE
        shown_first = await self._judge.wins(row, (completion, first))
        shown_second = await self._judge.wins(row, (first, completion))
        if shown_first is None or shown_second is None:
            return None
        return (shown_first + 1 - shown_second) / 2


def _keys(rows: Sequence[PromptRow]) -> dict[int, str]:
    """Return index of the row → a key of its prompt that stays the same if the data set is edited.

    The key is the digest of the prompt, and a number that distinguishes rows with the same prompt.
    """
    seen: Counter[str] = Counter()
    keys = {}
    for row in sorted(rows, key=lambda row: row.index):
        digest = digest_bytes(json.dumps(row.token_ids).encode())
        keys[row.index] = f"{digest}-{seen[digest]}"
        seen[digest] += 1
    return keys


def check_choices(answer: Any, size: int) -> tuple[int | None, ...]:
    """Return the answer of a judge: per pair 0 or 1 for the better completion, or None if neither is better.

    Raises:
        CallFailed: the answer is something else.
    """
    choices = plain(answer)
    if not isinstance(choices, list | tuple) or len(choices) != size:
        raise CallFailed(f"got {choices!r}, expected a list with {size} items, each 0, 1 or None")
    return tuple(_choice(plain(choice), index) for index, choice in enumerate(choices))


def _choice(choice: Any, index: int) -> int | None:
    if choice is None or choice == -1:  # TRL's judges return -1 if neither is better
        return None
    if choice not in (0, 1):
        raise CallFailed(
            f"got {choice!r} for pair {index}, expected 0 if the first completion is better, 1 if the second is, None "
            "if neither is"
        )
    return int(choice)
