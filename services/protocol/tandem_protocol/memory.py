"""The memory of this container: its limit, what is left, and whether the kernel has killed a process because of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_EVENTS = ("memory.events", "memory/memory.oom_control")
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Files of cgroup version 2 and 1. A container sees its own group there."""
_USED = ("memory.current", "memory/memory.usage_in_bytes")
_PARTS = ("memory.stat", "memory/memory.stat")
"""What the used memory consists of."""
_NO_LIMIT_BYTES = 1 << 60
"""Without a limit, version 1 shows a number above this, and version 2 shows the word `max`."""
_MACHINE = Path("/proc/meminfo")
_MOUNTS = Path("/proc/self/mounts")
_IN_MEMORY = ("tmpfs", "ramfs")


def oom_kills(root: Path = CGROUP) -> int:
    """How many processes of this container the kernel has killed because it reached its limit. 0 if not known."""
    words = _first(root, _EVENTS).split()
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def limit_bytes(root: Path = CGROUP) -> int | None:
    """The memory limit of this container. None if it has no limit, or if the limit is not known."""
    text = _first(root, _LIMITS).strip()
    return int(text) if text.isdecimal() and int(text) < _NO_LIMIT_BYTES else None


def available_bytes(root: Path = CGROUP, machine: Path = _MACHINE) -> int | None:
    """How much memory this container can still take: what the machine has left, or its own limit if that is nearer.

    Pages of files on a disk count as free, because the kernel drops them first. None if nothing is known.
    """
    left = []
    with suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in machine.read_text().splitlines())
        left.append(int(lines["MemAvailable"].split()[0]) << 10)
    if limit := limit_bytes(root):
        with suppress(KeyError, ValueError):
            parts = dict(line.split() for line in _first(root, _PARTS).splitlines())
            dropped = int(parts.get("total_inactive_file") or parts["inactive_file"])
            left.append(max(limit - int(_first(root, _USED)) + dropped, 0))
    return min(left, default=None)


def is_in_memory(folder: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether the files of a folder are held in memory. False if it is not known."""
    with suppress(OSError):
        points = [line.split()[1:3] for line in mounts.read_text().splitlines()]
        on_path = [(len(point), kind) for point, kind in points if folder.resolve().is_relative_to(point)]
        return max(on_path, default=(0, ""))[1] in _IN_MEMORY
    return False


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
