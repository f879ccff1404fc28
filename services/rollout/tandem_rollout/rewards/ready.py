"""Ready-made reward functions. Example: `function: tandem_rollout.rewards:exact_match`.

Options go under `arguments`. A completion is a string or a conversation, of which the last message is scored.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..functions import sandboxed

Completion = str | list[dict[str, Any]]


def exact_match(completions: Sequence[Completion], answer: Sequence[Any], **_: Any) -> list[float]:
    """Return 1 if the text equals the column `answer`, else 0. White space around both is ignored."""
    pairs = zip(completions, answer, strict=True)
    return [float(_text(completion).strip() == str(expected).strip()) for completion, expected in pairs]


def regex_match(completions: Sequence[Completion], pattern: str, **_: Any) -> list[float]:
    """Return 1 if the complete text matches `pattern`, else 0. Useful for checking a format.

    Example: `<think>.*</think>\\s*<answer>.*</answer>`. The dot matches line ends too.
    """
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.fullmatch(_text(completion)) is not None) for completion in completions]


@sandboxed
def math_answer(
    completions: Sequence[Completion], answer: Sequence[str], timeout_s: int = 5, **_: Any
) -> list[float | None]:
    """Return 1 if math-verify finds the column `answer` in the text, else 0. None if it cannot parse that column.

    math-verify evaluates expressions that the model wrote, and some of them take forever. The function therefore runs
    in a sandbox by default. There math-verify gives up on an expression after `timeout_s`. Without a sandbox this time
    limit has no effect, because math-verify uses a signal, which only a main thread can receive.

    Raises:
        UserError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError('math-verify is not installed. Fix: pip install "tandem-trainer[math]".') from error

    limit_s = timeout_s if threading.current_thread() is threading.main_thread() else None
    # At lower levels it warns of each expression that it cannot parse, and of a missing time limit.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def score(text: str, expected: str) -> float | None:
        gold = parse(expected, parsing_timeout=limit_s) or parse(f"${expected}$", parsing_timeout=limit_s)
        found = parse(text, parsing_timeout=limit_s)
        return float(verify(gold, found, timeout_seconds=limit_s)) if gold else None

    return [score(_text(c), str(expected)) for c, expected in zip(completions, answer, strict=True)]


def soft_overlong_punishment(
    completion_ids: Sequence[Sequence[int]], max_completion_length: int, cache_length: int, **_: Any
) -> list[float]:
    """Return 0 up to `max_completion_length` − `cache_length` tokens, then fall linearly to −1 at the maximum.

    Source: DAPO, arXiv:2503.14476, equation 13.
    """
    if not 0 < cache_length <= max_completion_length:
        raise UserError(f"cache_length is {cache_length}, expected 1 to max_completion_length {max_completion_length}")
    free = max_completion_length - cache_length
    return [-min(1.0, max(0.0, (len(ids) - free) / cache_length)) for ids in completion_ids]


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
