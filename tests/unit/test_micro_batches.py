"""Micro-batches have every row once and fit the budget, and prompts are computed once only where that saves tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tandem_trainer.micro_batches import PackedPrompts, Part, TokenRow, plan

FREE = PackedPrompts(pair_cost=0.0)


def _rows(*groups: tuple[int, Sequence[int]]) -> list[TokenRow]:
    """Rows of groups, each given as the length of its prompt and those of its completions."""
    return [
        TokenRow([100 + group] * prompt + list(range(completion)), prompt, prompt + completion)
        for group, (prompt, completions) in enumerate(groups)
        for completion in completions
    ]


def _plan(
    rows: list[TokenRow],
    max_tokens: int,
    *,
    units: list[list[int]] | None = None,
    shares_prompts: bool = True,
    packed: PackedPrompts | None = None,
) -> list[Part]:
    alone = [[number] for number in range(len(rows))]
    return list(plan(rows, units or alone, max_tokens, shares_prompts=shares_prompts, packed=packed))


def _computed(rows: list[TokenRow], parts: list[Part]) -> int:
    """Padded tokens that the model computes."""
    tokens = 0
    for part in parts:
        numbers = [row for unit in part.units for row in unit]
        tokens += part.is_first * part.length * len(part.prompt_rows)
        tokens += len(numbers) * (max(rows[number].end for number in numbers) - part.length)
    return tokens


def test_a_groups_prompt_is_computed_once_although_its_rows_need_several_micro_batches():
    rows = _rows((512, [128] * 8))
    parts = _plan(rows, max_tokens=1024)
    assert _computed(rows, parts) == 512 + 8 * 128
    assert _computed(rows, _plan(rows, 1024, shares_prompts=False)) == 8 * 640
    assert [(part.is_first, part.is_last) for part in parts] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]


def test_a_prompt_longer_than_a_micro_batch_is_computed_once():
    rows = _rows((3000, [10] * 4))
    assert _computed(rows, _plan(rows, max_tokens=1024)) == 3000 + 4 * 10


def test_prompts_of_similar_length_are_computed_together_and_others_are_not():
    rows = _rows((20, [30] * 4), (24, [30] * 4), (90, [30] * 4), (91, [30] * 4))
    parts = _plan(rows, max_tokens=10_000)
    assert [(part.length, len(part.prompt_rows)) for part in parts] == [(20, 2), (90, 2)]


def test_rows_without_an_equal_prompt_and_short_prompts_are_computed_as_rows():
    rows = _rows((500, [10]), (700, [10]), (10, [500] * 4))
    assert {part.length for part in _plan(rows, max_tokens=1024)} == {0}


def test_a_short_completion_is_not_padded_to_a_long_one_with_the_same_prompt():
    rows = _rows((300, [20, 30, 500, 600]))
    parts = _plan(rows, max_tokens=10_000)
    assert [part.units for part in parts] == [[[0], [1]], [[2], [3]]]


def test_prompts_are_not_shared_if_padding_costs_more_than_that_saves():
    rows = _rows((20, [60, 60, 60, 130]), (200, [60, 60, 60, 130]))
    assert [part.length for part in _plan(rows, max_tokens=10_000)] == [0, 200]


def test_rows_of_one_unit_stay_together():
    rows = _rows((60, [10, 20]), (60, [30, 5]), (8, [10, 200]))
    units = [[0, 1], [2, 3], [4, 5]]
    for max_tokens in (1, 100, 1000):
        parts = _plan(rows, max_tokens, units=units)
        assert sorted(unit for part in parts for unit in part.units) == units
        assert any(part.length for part in parts)


def test_packed_prompts_are_computed_once_per_micro_batch_which_they_fit():
    rows = _rows((512, [128] * 8))
    parts = _plan(rows, max_tokens=1024, packed=FREE)
    assert [(part.is_first, part.is_last, len(part.units)) for part in parts] == [(True, True, 4)] * 2
    assert _computed(rows, parts) == 2 * (512 + 4 * 128)


def test_prompts_are_not_packed_if_the_attention_costs_more_than_that_saves():
    short, long, dear = _rows((128, [512] * 8)), _rows((1024, [64] * 8)), PackedPrompts(pair_cost=1e-3)
    assert {part.length for part in _plan(short, 8192, packed=FREE)} == {128}
    assert {part.length for part in _plan(short, 8192, packed=dear)} == {0}
    assert {part.length for part in _plan(long, 8192, packed=dear)} == {1024}


def test_a_micro_batch_of_packed_prompts_counts_only_its_own_prompts():
    """Units of two rows: one has a prompt of the group, and the other its own."""
    rows = [TokenRow([number * (row + 1)] * 256 + [1] * 20, 256, 276) for number in range(1, 9) for row in (0, 1)]
    rows = [row._replace(token_ids=[0] * 256 + [1] * 20) if n % 2 == 0 else row for n, row in enumerate(rows)]
    parts = _plan(rows, max_tokens=2048, units=[[n, n + 1] for n in range(0, 16, 2)], packed=FREE)
    assert max(len(part.units) for part in parts) > 3


def test_packed_rows_are_padded_if_that_costs_less_than_their_prompt():
    parts = _plan(_rows((512, [64, 128, 192, 256])), max_tokens=10_000, packed=FREE)
    assert [len(part.units) for part in parts] == [4]


def test_packed_prompts_are_not_put_together():
    parts = _plan(_rows((20, [30] * 4), (24, [30] * 4)), max_tokens=10_000, packed=FREE)
    assert [(part.length, len(part.prompt_rows)) for part in parts] == [(20, 1), (24, 1)]


@pytest.mark.parametrize("packed", [None, FREE], ids=["cache", "packed"])
@pytest.mark.parametrize("seed", range(20))
def test_random_rows(seed: int, packed: PackedPrompts | None):
    rng = random.Random(seed)
    groups = [
        (rng.choice([1, 5, 20, 21, 40, 300]), [rng.randint(1, 60) for _ in range(rng.randint(1, 6))])
        for _ in range(rng.randint(1, 8))
    ]
    rows = _rows(*groups)
    rng.shuffle(rows)
    max_tokens = rng.choice([1, 100, 400])
    parts = _plan(rows, max_tokens, packed=packed)
    assert sorted(row for part in parts for unit in part.units for row in unit) == list(range(len(rows)))
    assert _computed(rows, parts) <= _computed(rows, _plan(rows, max_tokens, shares_prompts=False)) * 1.15
    for part in parts:
        numbers = [row for unit in part.units for row in unit]
        longest = max(rows[row].end for row in numbers)
        prompts = part.length * len(part.prompt_rows)
        assert prompts + len(numbers) * (longest - part.length) <= max_tokens or len(numbers) == 1
        assert len(part.prompts) == len(numbers)
        for row, prompt in zip(numbers, part.prompts, strict=True) if part.length else []:
            first = rows[part.prompt_rows[prompt]].token_ids[: part.length]
            assert rows[row].token_ids[: part.length] == first
            assert part.length <= rows[row].start, "the tokens of a shared prompt are never sampled"
