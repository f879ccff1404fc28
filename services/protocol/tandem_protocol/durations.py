"""How the log and the screens write a duration."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`42 s`, `8 min 26 s` or `3 h 20 min`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    size, large, small = (60, "min", "s") if seconds < 3599.5 else (3600, "h", "min")
    parts = divmod(round(seconds * 60 / size), 60)
    return " ".join(f"{number} {unit}" for number, unit in zip(parts, (large, small), strict=True) if number)
