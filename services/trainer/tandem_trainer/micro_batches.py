"""Decide which rows share a micro-batch, and which prompts are computed once for several rows.

Example: 8 completions of 128 tokens have the same prompt of 512 tokens. In rows of their own they cost 8 · 640 tokens.
With the prompt computed once, they cost 512 + 8 · 128. They may still need several micro-batches. These follow each
other, so that the learner keeps the prompt from the first to the last.

Prompts of similar length are computed together: as many first tokens of each as the shortest has. The remaining tokens
of the longer ones stay in the rows. So no prompt is padded, and every model computes the same as without sharing.

If prompts are packed with their rows (`PackedPrompts`), each micro-batch computes its prompts again. In the example,
two micro-batches of 1024 tokens each have the prompt and 4 completions.
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


class PackedPrompts(NamedTuple):
    """Prompts are computed in one long row with the rows that begin with them, instead of in a cache."""

    pair_cost: float
    """Time of the attention between two tokens, relative to that of all else that is computed for a token."""


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

    def __init__(
        self, rows: Sequence[TokenRow], units: list[list[int]], length: int, packed: PackedPrompts | None
    ) -> None:
        self._rows = rows
        self._units = units
        self._length = length
        self._packed = packed if length else None
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
        """Whether computing its prompts once saves enough time, padding included."""
        parts = [*self.parts(max_tokens)]
        sizes = [len(part.prompts) * (max(map(self._longest, part.units)) - self._length) for part in parts]
        prompts = [self._length * len(part.prompt_rows) for part in parts]
        lengths = [self._longest(unit) for unit in self._units for _ in unit]
        if not self._packed:
            return prompts[0] + sum(sizes) <= (1 - 1 / WORTHWHILE) * sum(lengths)
        cost = self._packed.pair_cost
        # A row of its own compares each token with those before it only.
        unshared = sum(length + cost * length**2 / 2 for length in lengths)
        computed = sum(tokens + cost * tokens**2 for tokens in map(sum, zip(prompts, sizes, strict=True)))
        return computed <= (1 - 1 / WORTHWHILE) * unshared

    def parts(self, max_tokens: int) -> Iterator[Part]:
        """Yield parts of at most `max_tokens` padded tokens, or of one unit, with units of similar length together."""
        picks: list[list[list[int]]] = [[]]
        size = 0
        for unit in sorted(self._units, key=self._longest):
            tokens = self._length * len(self._prompts_with([*picks[-1], unit])) + self._tokens(unit, size)
            if picks[-1] and (tokens > max_tokens or self._is_longer(unit, picks[-1])):
                picks.append([])
                size = 0
            picks[-1].append(unit)
            size += len(unit)
        for number, units in enumerate(picks):
            own = self._prompts_with(units)
            yield Part(
                units,
                self._length,
                [self._prompt_rows[prompt] for prompt in own],
                [own.index(self._prompt_of[row]) for unit in units for row in unit],
                is_first=number == 0 or self._packed is not None,
                is_last=number == len(picks) - 1 or self._packed is not None,
            )

    def _is_longer(self, unit: list[int], others: list[list[int]]) -> bool:
        """Whether padding to the length of `unit` would cost more than another micro-batch with the same prompts."""
        if not self._length:
            return False
        longest = self._longest(unit)
        if self._packed:  # another micro-batch computes its prompts again
            return sum(len(one) * (longest - self._longest(one)) for one in others) > (
                self._length * len(self._prompts_with([unit]))
            )
        return longest - self._length > 2 * (self._longest(others[0]) - self._length) + SLACK

    def _prompts_with(self, units: list[list[int]]) -> Sequence[int]:
        """Numbers of the prompts in a micro-batch with these units. A cache has those of all micro-batches."""
        if not self._packed:
            return range(len(self._prompt_rows))
        return sorted({self._prompt_of[row] for unit in units for row in unit})

    def _longest(self, unit: list[int]) -> int:
        return max(self._rows[row].end for row in unit)

    def _tokens(self, unit: list[int], others: int) -> int:
        """Padded tokens of the unit and of `others` shorter rows. The prompts computed once do not count."""
        copies = 0 if self._packed else self._length // CACHED
        return (len(unit) + others) * (self._longest(unit) - self._length + copies)


def plan(
    rows: Sequence[TokenRow],
    units: list[list[int]],
    max_tokens: int,
    *,
    shares_prompts: bool,
    packed: PackedPrompts | None = None,
) -> Iterator[Part]:
    """Split the rows into parts of at most `max_tokens` padded tokens. A longer unit is a part of its own.

    Args:
        units: numbers of the rows that have to be in the same micro-batch.
        shares_prompts: compute equal prompts once where that is worthwhile.
        packed: compute them in one row with the rows that begin with them.
    """
    blocks = [*_blocks(rows, units, max_tokens, packed)] if shares_prompts else []
    worthwhile = [block for block in blocks if block.is_worthwhile(max_tokens)]
    sharing = {row for block in worthwhile for row in block.rows}
    if rest := [unit for unit in units if unit[0] not in sharing]:
        worthwhile.insert(0, _Block(rows, rest, 0, packed))
    for block in worthwhile:
        yield from block.parts(max_tokens)


def _blocks(
    rows: Sequence[TokenRow], units: list[list[int]], max_tokens: int, packed: PackedPrompts | None
) -> Iterator[_Block]:
    """Put units with equal prompts together, and units with prompts of similar length.

    Packed prompts are not put together, because the attention would compare the tokens of one with those of the others.
    """
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for unit in units:
        shortest = min((rows[row] for row in unit), key=lambda row: row.start)
        by_prompt.setdefault(tuple(shortest.token_ids[: shortest.start]), []).append(unit)
    together: list[list[int]] = []
    length = prompts = 0
    for prompt in sorted(by_prompt, key=lambda prompt: (len(prompt), prompt)):
        is_similar = len(prompt) - length <= max(SLACK, length // 4)
        if together and (packed or not (is_similar and (prompts + 1) * length * MOST <= max_tokens)):
            yield _Block(rows, together, length, packed)
            together = []
        if not together:
            length, prompts = len(prompt), 0
        together += by_prompt[prompt]
        prompts += 1
    yield _Block(rows, together, length, packed)
