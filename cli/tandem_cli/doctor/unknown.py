"""Facts that could not be gathered, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

FactT = TypeVar("FactT")


@dataclass(frozen=True)
class Unknown:
    """A fact that could not be gathered."""

    reason: str
    """The text is short, because each check that needs the fact repeats it."""
    fix: str = ""
    """What the user can do about it."""
    detail: str = ""
    """Only the check that is about this fact shows the detail."""

    @property
    def message(self) -> str:
        """The reason with its detail."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class Refused(Unknown):
    """A fact that does not exist or must not be read, such as a model that is not on the hub. Do not retry."""


class NotKnown(Exception):
    """A check needs a fact that could not be gathered. The message is the reason."""


def known(fact: FactT | Unknown) -> FactT:
    """Return the fact.

    Raises:
        NotKnown: the fact is `Unknown`.
    """
    if isinstance(fact, Unknown):
        raise NotKnown(fact.reason)
    return fact
