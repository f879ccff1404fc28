"""User errors, reported without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Prompts, rewards, model or generators are not what the run needs; the message says how to fix it."""


class MismatchTooHigh(UserError):
    """Trainer and generators give the same tokens different probabilities under the same weights."""
