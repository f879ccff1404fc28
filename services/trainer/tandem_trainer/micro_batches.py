"""Decide which rows share a micro-batch, and which prompts are computed once for several rows.

Example: 8 completions of 128 tokens have the same prompt of 512 tokens. In rows of their own they cost 8 · 640 tokens.
With the prompt computed once, they cost 512 + 8 · 128. They may still need several micro-batches. These follow each
other, so that the learner keeps the prompt from the first to the last.

Prompts of similar length are computed together: as many first tokens of each as the shortest has. The remaining tokens
of the longer ones stay in the rows. So no prompt is padded, and every model computes the same as without sharing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

CACHED = 8
"""A row's copy of a prompt's keys and values needs about 1/8 of the memory of computing the prompt."""
WORTHWHILE = 8
"""Prompts are computed once if that saves at least 1/8 of the tokens. It costs a second call of the model."""
SLACK = 16
"""Prompts are computed together if their lengths differ by at most 16 tokens, or by a quarter."""
MOST = 4
"""Prompts that are computed together take at most 1/4 of a micro-batch. A longer one is alone."""


class TokenRow(NamedTuple):
    """What has to be known of a row."""

    token_ids: Sequence[int]
    start: int
    """Position of the first sampled token."""
    end: int
    """Position behind the last sampled token."""


@dataclass(frozen=True)
class Part:
    """The rows of one micro-batch, and the prompts that are computed once for them."""

    units: list[list[int]]
    """Numbers of the rows, by unit."""
    length: int
    """Number of first tokens of each row that are computed once. 0: none."""
    prompt_rows: list[int]
    """For each prompt, the number of a row that begins with it. Some prompts may have no row in this part."""
    prompts: list[int]
    """For each row of this part, the number of its prompt."""
    is_first: bool
    """Whether it is the first of the parts with these prompts, which follow each other."""
    is_last: bool
    """Whether it is the last of them."""


class _Block:
    """Units whose prompts are computed together. With `length` 0, no prompt is computed once."""

    def __init__(self, rows: Sequence[TokenRow], units: list[list[int]], length: int) -> None:
        self._rows = rows
        self._units = units
        self._length = length
        first_rows: dict[tuple[int, ...], int] = {}
        prompts = {row: tuple(rows[row].token_ids[:length]) for unit in units for row in unit}
        for row, prompt in prompts.items():
            first_rows.setdefault(prompt, row)
        numbers = {prompt: number for number, prompt in enumerate(first_rows)}
        self._prompt_rows = list(first_rows.values())
        self._prompt_of = {row: numbers[prompt] for row, prompt in prompts.items()}

    @property
    def rows(self) -> Iterable[int]:
        """Numbers of its rows."""
        return self._prompt_of

    def is_worthwhile(self, max_tokens: int) -> bool:
        """Whether computing its prompts once saves enough tokens, padding included."""
        computed = self._length * len(self._prompt_rows)
        for part in self.parts(max_tokens):
            rest = max(map(self._longest, part.units)) - self._length
            computed += len(part.prompts) * rest
        unshared = sum(len(unit) * self._longest(unit) for unit in self._units)
        return computed <= (1 - 1 / WORTHWHILE) * unshared

    def parts(self, max_tokens: int) -> Iterator[Part]:
        """Yield parts of at most `max_tokens` padded tokens, or of one unit, with units of similar length together."""
        budget = max_tokens - self._length * len(self._prompt_rows)
        picks: list[list[list[int]]] = [[]]
        size = 0
        for unit in sorted(self._units, key=self._longest):
            if picks[-1] and (self._tokens(unit, size) > budget or self._is_longer(unit, picks[-1][0])):
                picks.append([])
                size = 0
            picks[-1].append(unit)
            size += len(unit)
        for number, units in enumerate(picks):
            prompts = [self._prompt_of[row] for unit in units for row in unit]
            yield Part(units, self._length, self._prompt_rows, prompts, number == 0, number == len(picks) - 1)

    def _is_longer(self, unit: list[int], shortest: list[int]) -> bool:
        """Whether padding to the length of `unit` would cost more than another micro-batch with the same prompts."""
        rest = self._longest(shortest) - self._length
        return self._length > 0 and self._longest(unit) - self._length > 2 * rest + SLACK

    def _longest(self, unit: list[int]) -> int:
        return max(self._rows[row].end for row in unit)

    def _tokens(self, unit: list[int], others: int) -> int:
        """Padded tokens of the unit and of `others` shorter rows. The prompts computed once do not count."""
        return (len(unit) + others) * (self._longest(unit) - self._length + self._length // CACHED)


def plan(rows: Sequence[TokenRow], units: list[list[int]], max_tokens: int, *, shares_prompts: bool) -> Iterator[Part]:
    """Split the rows into parts of at most `max_tokens` padded tokens. A longer unit is a part of its own.

    Args:
        units: numbers of the rows that have to be in the same micro-batch.
        shares_prompts: compute equal prompts once where that is worthwhile.
    """
    blocks = [*_blocks(rows, units, max_tokens)] if shares_prompts else []
    worthwhile = [block for block in blocks if block.is_worthwhile(max_tokens)]
    sharing = {row for block in worthwhile for row in block.rows}
    if rest := [unit for unit in units if unit[0] not in sharing]:
        worthwhile.insert(0, _Block(rows, rest, length=0))
    for block in worthwhile:
        yield from block.parts(max_tokens)


def _blocks(rows: Sequence[TokenRow], units: list[list[int]], max_tokens: int) -> Iterator[_Block]:
    """Put units with equal prompts together, and units with prompts of similar length."""
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for unit in units:
        shortest = min((rows[row] for row in unit), key=lambda row: row.start)
        by_prompt.setdefault(tuple(shortest.token_ids[: shortest.start]), []).append(unit)
    together: list[list[int]] = []
    length = prompts = 0
    for prompt in sorted(by_prompt, key=lambda prompt: (len(prompt), prompt)):
        is_similar = len(prompt) - length <= max(SLACK, length // 4)
        if together and not (is_similar and (prompts + 1) * length * MOST <= max_tokens):
            yield _Block(rows, together, length)
            together = []
        if not together:
            length, prompts = len(prompt), 0
        together += by_prompt[prompt]
        prompts += 1
    yield _Block(rows, together, length)
