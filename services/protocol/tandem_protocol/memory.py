"""The memory limit of this container: how large it is, and whether the kernel has killed a process because of it."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_EVENTS = ("memory.events", "memory/memory.oom_control")
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Files of cgroup version 2 and 1. A container sees its own group there."""
_NO_LIMIT_BYTES = 1 << 60
"""Without a limit, version 1 shows a number above this, and version 2 shows the word `max`."""


def oom_kills(root: Path = CGROUP) -> int:
    """How many processes of this container the kernel has killed because it reached its limit. 0 if not known."""
    words = _first(root, _EVENTS).split()
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def limit_bytes(root: Path = CGROUP) -> int | None:
    """The memory limit of this container. None if it has no limit, or if the limit is not known."""
    text = _first(root, _LIMITS).strip()
    return int(text) if text.isdecimal() and int(text) < _NO_LIMIT_BYTES else None


def why_killed(variable: str, smaller: str, root: Path = CGROUP) -> str:
    """Explain that the kernel has killed a process of this container.

    Args:
        variable: the variable of compose.yaml that sets the limit.
        smaller: a setting that makes the process need less memory.
    """
    limit = limit_bytes(root)
    size = f" of {limit / 2**30:.1f} GiB" if limit else ""
    return (
        f"the kernel killed a process because the container reached its memory limit{size}. Fix: raise {variable}, or "
        f"{smaller}."
    )


def _first(root: Path, names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return (root / name).read_text()
        except OSError:
            continue
    return ""
