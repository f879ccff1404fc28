"""The judge of this example. It gives no scores: it says which of two names is easier to pronounce."""

from itertools import pairwise
from typing import Any

VOWELS = set("aeiou")
LENGTH = 8


def prefer(prompts: list[str], completions: list[list[str]], **_: Any) -> list[int | None]:
    """Return the index of the better name of each pair, 0 or 1; None if both are equally hard."""
    choices: list[int | None] = []
    for beginning, (first, second) in zip(prompts, completions, strict=True):
        hard_first = hardness(beginning + first)
        hard_second = hardness(beginning + second)
        choices.append(None if hard_first == hard_second else int(hard_second < hard_first))
    return choices


def hardness(name: str) -> int:
    """Count neighbours that are both vowels or both consonants, repeated letters, and letters too many or too few."""
    clashes = sum((a in VOWELS) == (b in VOWELS) for a, b in pairwise(name))
    repeated = len(name) - len(set(name))
    return clashes + repeated + abs(len(name) - LENGTH)
