"""A judge of the user's project: of two completions, which is better? And how often does the policy beat its start?"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tandem_protocol.manifest import digest_bytes
from tandem_protocol.messages import Group
from tandem_protocol.version import Version

from .batch import ScoredGroup
from .calls import ProjectFunction, in_process
from .client import task_group
from .functions import CallFailed, load_function, plain
from .prompts import PromptRow
from .rewards import as_in_prompt, decode, scored_group

TIE = 0.5


class Judge:
    """Scores groups of two: 1 for the better completion, 0 for the other, 0.5 for both if neither is better."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, *, drop_errors: bool, timeout_s: float) -> None:
        """Load the function; `timeout_s` is the deadline of a call.

        Raises:
            UserError: it does not exist or cannot be imported.
        """
        function = load_function("judge", name)
        call = in_process(function, timeout_s, asyncio.Lock())
        self._function = ProjectFunction("judge", name, function, call, check_choices, drop_errors=drop_errors)
        self._tokenizer = tokenizer

    def check_parameters(self, rows: Sequence[PromptRow]) -> None:
        """See that the function can be called with the columns of these rows.

        Raises:
            UserError: it cannot; names the row and the parameter.
        """
        self._function.check_parameters(rows, ("prompts", "completions"))

    async def score(self, row: PromptRow, group: Group) -> ScoredGroup:
        """See Scorer."""
        unjudged = self.unjudged(row, group)
        wins = await self.wins(row, unjudged.texts)
        return unjudged if wins is None else self.judged(unjudged, (wins, 1 - wins))

    def unjudged(self, row: PromptRow, group: Group) -> ScoredGroup:
        """The completions, however many, without a reward."""
        texts = decode(self._tokenizer, group)
        nothing = (None,) * len(texts)
        return scored_group(row, group, texts, nothing, {self._function.name: nothing})

    def judged(self, group: ScoredGroup, rewards: tuple[float | None, ...]) -> ScoredGroup:
        return group.model_copy(update={"rewards": rewards, "rewards_by_function": {self._function.name: rewards}})

    async def wins(self, row: PromptRow, texts: Sequence[str]) -> float | None:
        """1 if the first of two is better, 0 if the second is; None if the judge failed and errors are dropped."""
        choices = await self._function(row, 1, completions=[as_in_prompt(row, texts)])
        return None if choices is None else TIE if choices[0] is None else 1.0 - choices[0]


class WinRate:
    """Rewards a completion by how it fares against that of the run's first evaluated policy, for the same prompt."""

    def __init__(self, judge: Judge, rows: Sequence[PromptRow], file: Path) -> None:
        """
        Args:
            file: keeps the first policy's completions, for as long as the run goes on.
        """
        self._judge, self._file = judge, file
        self._rows = {row.index: row for row in rows}

    async def score(self, row: PromptRow, group: Group) -> ScoredGroup:
        """See Scorer; rewards come with the call below, when all completions are there."""
        return self._judge.unjudged(row, group)

    async def __call__(self, groups: Sequence[ScoredGroup], version: Version) -> list[ScoredGroup]:
        """The groups with rewards; those of the first policy are ties.

        Raises:
            UserError: the judge failed, and errors are not dropped.
        """
        keys = _keys(groups)
        if version.step == 0 or not self._file.exists():
            temporary = self._file.with_suffix(".tmp")
            temporary.write_text(json.dumps({keys[group.row]: group.texts for group in groups}))
            temporary.replace(self._file)
        first = json.loads(self._file.read_text())
        async with task_group() as judging:
            tasks = [judging.create_task(self._against(group, first.get(keys[group.row], ()))) for group in groups]
        return [task.result() for task in tasks]

    async def _against(self, group: ScoredGroup, first: Sequence[str]) -> ScoredGroup:
        """Sample by sample; None where the first policy has none."""
        pairs = itertools.zip_longest(group.texts, first[: len(group.texts)])
        return self._judge.judged(group, tuple([await self._rate(self._rows[group.row], pair) for pair in pairs]))

    async def _rate(self, row: PromptRow, pair: tuple[str, str | None]) -> float | None:
        """Both orders are judged, for a judge may like what comes first; two equal texts are a tie."""
        text, first = pair
        if first is None or first == text:
            return None if first is None else TIE
        ahead, behind = await self._judge.wins(row, (text, first)), await self._judge.wins(row, (first, text))
        return None if ahead is None or behind is None else (ahead + 1 - behind) / 2


def _keys(groups: Sequence[ScoredGroup]) -> dict[int, str]:
    """Row → a name of its prompt that an edited data set keeps: the prompt's digest, and which of its likes it is."""
    seen: Counter[str] = Counter()
    keys = {}
    for group in sorted(groups, key=lambda group: group.row):
        digest = digest_bytes(json.dumps(group.prompt_ids).encode())
        keys[group.row] = f"{digest}-{seen[digest]}"
        seen[digest] += 1
    return keys


def check_choices(answer: Any, size: int) -> tuple[int | None, ...]:
    """The answer of a judge: 0 or 1 a pair, None for neither.

    Raises:
        CallFailed: it is not that.
    """
    choices = plain(answer)
    if not isinstance(choices, list | tuple) or len(choices) != size:
        raise CallFailed(f"got {choices!r}, expected a list of {size}, one of 0, 1 and None per pair")
    return tuple(_choice(plain(choice), index) for index, choice in enumerate(choices))


def _choice(choice: Any, index: int) -> int | None:
    if choice is None or choice == -1:  # TRL's judges say -1 for neither
        return None
    if choice not in (0, 1):
        raise CallFailed(
            f"got {choice!r} for pair {index}, expected 0 if the first completion is better, 1 if the second is, None "
            "if neither is"
        )
    return int(choice)
