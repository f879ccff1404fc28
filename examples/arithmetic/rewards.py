"""The reward of the arithmetic example: the score of reasoning-gym's verifier."""

import functools
from typing import Any

import reasoning_gym

Conversation = list[dict[str, str]]

verifier = functools.cache(reasoning_gym.get_score_answer_fn)


def score_answer(completions: list[Conversation], entry: list[dict[str, Any]], **_: Any) -> list[float]:
    """Score each answer: 1 for the right number, less for a longer text that contains it, else 0."""
    return [
        verifier(question["metadata"]["source_dataset"])(final_answer(completion[-1]["content"]), question)
        for completion, question in zip(completions, entry, strict=True)
    ]


def final_answer(text: str) -> str:
    """Return the text after the last equals sign, or all of it if there is none."""
    return text.rpartition("=")[2].strip()
