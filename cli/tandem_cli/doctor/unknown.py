"""Facts that could not be had, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

FactT = TypeVar("FactT")


@dataclass(frozen=True)
class Unknown:
    """A fact that could not be had. `reason` is short, since each check that needs the fact repeats it."""

    reason: str
    fix: str = ""
    detail: str = ""

    @property
    def message(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class Refused(Unknown):
    """A fact that was asked for and denied: asking again changes nothing."""


class NotKnown(Exception):
    """A check needs a fact that could not be had; the message is the reason."""


def known(fact: FactT | Unknown) -> FactT:
    """The fact itself.

    Raises:
        NotKnown: it could not be had.
    """
    if isinstance(fact, Unknown):
        raise NotKnown(fact.reason)
    return fact
