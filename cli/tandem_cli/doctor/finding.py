"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    """The check's name in `CHECKS`."""
    status: Status
    message: str
    """The actual value and, if they differ, the expected one."""
    fix: str = ""
    """What the user can do about it: `run ...` or `set ...`. Empty if there is nothing to do."""


def ok(message: str) -> Finding:
    """Return a finding without its name, which `examine` fills in; `warn` and `fail` likewise."""
    return Finding("", "ok", message)


def warn(message: str, fix: str = "") -> Finding:
    return Finding("", "warn", message, fix)


def fail(message: str, fix: str) -> Finding:
    return Finding("", "fail", message, fix)


def gib(size_bytes: float) -> str:
    """Format a size: 1610612736 → `1.5 GiB`. Sizes below 1 GiB are in MiB."""
    return f"{size_bytes / (1 << 30):.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes / (1 << 20):.1f} MiB"


def count(number: float) -> str:
    """Format a number of parameters as in the names of models: 7615616512 → `7.62 B`, 811008 → `0.81 M`."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
