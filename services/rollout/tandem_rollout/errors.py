"""User errors, reported without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """The prompts, rewards, model or generators do not fit the run. The message says how to fix it."""


class ImportFailed(UserError):
    """The module of a function of the project cannot be imported. Its cause is the error that the import raised."""
