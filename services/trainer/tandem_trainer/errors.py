"""What goes wrong by the user's hand, told without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Prompts, rewards, model or generators are not what the run needs; the message says how to mend it."""
