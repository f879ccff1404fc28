"""User errors, reported without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """The project and the model do not fit each other. The message says how to fix it."""
