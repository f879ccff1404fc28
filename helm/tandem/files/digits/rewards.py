"""The reward of the digits example."""

from typing import Any


def exact_match(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Score each completion: 1 for the digits in ascending order, else 0."""
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]
