"""The judge of this example. It never grades: it only says which of two names it likes better."""

from itertools import pairwise
from typing import Any

VOWELS = set("aeiou")
LENGTH = 8


def prefer(prompts: list[str], completions: list[list[str]], **_: Any) -> list[int | None]:
    """0 or 1 for each pair: which name is easier to say; None if both are as hard."""
    choices: list[int | None] = []
    for beginning, (first, second) in zip(prompts, completions, strict=True):
        hard_first, hard_second = hardness(beginning + first), hardness(beginning + second)
        choices.append(None if hard_first == hard_second else int(hard_second < hard_first))
    return choices


def hardness(name: str) -> int:
    """Neighbours that are both vowels or both consonants, letters that were there before, letters too many or few."""
    clashes = sum((a in VOWELS) == (b in VOWELS) for a, b in pairwise(name))
    return clashes + len(name) - len(set(name)) + abs(len(name) - LENGTH)
