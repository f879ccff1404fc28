"""Rewards that many projects want: `function: tandem_trainer.ready_rewards:exact_match`, options under `arguments`.

All take completions as strings or conversations, of which the last turn counts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from .errors import UserError

Completion = str | list[dict[str, Any]]


def exact_match(completions: Sequence[Completion], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where the text is the column `answer`, white space around both left aside; else 0."""
    return [float(_text(c).strip() == str(wanted).strip()) for c, wanted in zip(completions, answer, strict=True)]


def regex_match(completions: Sequence[Completion], pattern: str, **_: Any) -> list[float]:
    """1 where the whole text matches `pattern` (its dot matches line ends too), else 0: for formats.

    For instance `<think>.*</think>\\s*<answer>.*</answer>`.
    """
    wanted = re.compile(pattern, re.DOTALL)
    return [float(wanted.fullmatch(_text(c)) is not None) for c in completions]


def math_answer(completions: Sequence[Completion], answer: Sequence[str], **_: Any) -> list[float | None]:
    """1 where math-verify finds the column `answer` in the text, else 0; None where it cannot read that column.

    It computes with what the model wrote, and some expressions take for ever: use it with `sandbox: true`.

    Raises:
        UserError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError('math-verify is not installed; pip install "tandem-trainer[math]"') from error

    # Its own deadlines are signals, which the main thread alone can take; it warns that without them there are none.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def score(text: str, wanted: str) -> float | None:
        gold = parse(wanted, parsing_timeout=None) or parse(f"${wanted}$", parsing_timeout=None)
        got = parse(text, parsing_timeout=None)
        return float(verify(gold, got, timeout_seconds=None)) if gold else None

    return [score(_text(c), str(wanted)) for c, wanted in zip(completions, answer, strict=True)]


def soft_overlong_punishment(
    completion_ids: Sequence[Sequence[int]], max_completion_length: int, cache_length: int, **_: Any
) -> list[float]:
    """0 up to `max_completion_length` − `cache_length` tokens, from there on falling evenly to −1 at the maximum.

    Source: DAPO, arXiv:2503.14476, equation 13.
    """
    if not 0 < cache_length <= max_completion_length:
        raise UserError(f"cache_length is {cache_length}; wanted 1 to max_completion_length {max_completion_length}")
    free = max_completion_length - cache_length
    return [-min(1.0, max(0.0, (len(ids) - free) / cache_length)) for ids in completion_ids]


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
