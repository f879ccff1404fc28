"""The reward of the digits example."""

from typing import Any


def exact_match(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for the digits in ascending order, 0 for anything else."""
    return [float(completion == wanted) for completion, wanted in zip(completions, answer, strict=True)]
