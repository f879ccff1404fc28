"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """`message` says what was got and what was wanted; `fix` what to do, a command where there is one."""

    name: str
    """Of the check."""
    status: Status
    message: str
    fix: str = ""


def ok(message: str) -> Finding:
    return Finding("", "ok", message)


def warn(message: str, fix: str = "") -> Finding:
    return Finding("", "warn", message, fix)


def fail(message: str, fix: str) -> Finding:
    return Finding("", "fail", message, fix)


def gib(size_bytes: float) -> str:
    """1610612736 → `1.5 GiB`; small sizes in MiB."""
    return f"{size_bytes / (1 << 30):.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes / (1 << 20):.1f} MiB"


def count(number: float) -> str:
    """7615616512 → `7.62 B`, 811008 → `0.81 M`: as models are named."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
