"""Make text from models and tools safe to render, to store and to read."""

from __future__ import annotations

from typing import TypeVar

ValueT = TypeVar("ValueT")


def without_surrogates(value: ValueT) -> ValueT:
    """Replace lone surrogates in text, and in all text of a JSON value.

    JSON such as `"\\ud83d"` parses to a lone surrogate. Neither a tokenizer nor a JSON file accepts it.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # type: ignore[return-value]
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]  # type: ignore[return-value]
    if isinstance(value, dict):
        return {without_surrogates(k): without_surrogates(v) for k, v in value.items()}  # type: ignore[return-value]
    return value


def cut(text: str, max_characters: int) -> str:
    """Cut text that is too long, and say so at its end."""
    if len(text) <= max_characters:
        return text
    return f"{text[:max_characters]}… ({len(text)} characters, of which the first {max_characters} are shown)"
