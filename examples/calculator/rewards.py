"""The reward of the calculator example."""

from typing import Any

Conversation = list[dict[str, Any]]


def exact_match(completions: list[Conversation], answer: list[str], **_: Any) -> list[float]:
    """Score each episode: 1 if its last message is the right number, else 0."""
    return [
        float(messages[-1]["role"] == "assistant" and messages[-1]["content"] == expected)
        for messages, expected in zip(completions, answer, strict=True)
    ]
