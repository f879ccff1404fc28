"""The reward of the arithmetic example: reasoning-gym's own verdict."""

import functools
from typing import Any

import reasoning_gym

Conversation = list[dict[str, str]]

verifier = functools.cache(reasoning_gym.get_score_answer_fn)


def score_answer(completions: list[Conversation], entry: list[dict[str, Any]], **_: Any) -> list[float]:
    """What the question's verifier says: 1 for the right number, less for a longer text that has it in it, else 0."""
    return [
        verifier(question["metadata"]["source_dataset"])(final_answer(completion[-1]["content"]), question)
        for completion, question in zip(completions, entry, strict=True)
    ]


def final_answer(text: str) -> str:
    """What stands behind the last equals sign; the whole text without one."""
    return text.rpartition("=")[2].strip()
