"""The memory of this container: its limit, what is left, and whether the kernel has killed a process because of it."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_EVENTS = ("memory.events", "memory/memory.oom_control")
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Files of cgroup version 2 and 1. A container sees its own group there."""
_NO_LIMIT_BYTES = 1 << 60
"""Without a limit, version 1 shows a number above this, and version 2 shows the word `max`."""
_MACHINE = Path("/proc/meminfo")
_OWN = Path("/proc/self/cgroup")
_MOUNTS = Path("/proc/self/mounts")
_IN_MEMORY = (b"tmpfs", b"ramfs")
_ESCAPED = re.compile(rb"\\([0-7]{3})")
"""A space in a mount point is `\\040`."""


def oom_kills(root: Path = CGROUP) -> int:
    """How many processes of this container the kernel has killed because it reached its limit. 0 if not known."""
    words = _first(root, _EVENTS).split()
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def limit_bytes(root: Path = CGROUP) -> int | None:
    """The memory limit of this container. None if it has no limit, or if the limit is not known."""
    text = _first(root, _LIMITS).strip()
    return int(text) if text.isdecimal() and int(text) < _NO_LIMIT_BYTES else None


def available_bytes(root: Path = CGROUP, machine: Path = _MACHINE, own: Path = _OWN) -> int | None:
    """How much memory this process can still take: what the machine has left, or the nearest limit of its groups.

    Pages of files on a disk count as free, because the kernel drops them first. None if nothing is known.
    """
    left = []
    with suppress(OSError, KeyError, ValueError):
        left.append(machine_bytes(machine))
    for folder in _groups(root, own):
        with suppress(OSError, KeyError, ValueError):
            left.append(_left_bytes(folder))
    return min(left, default=None)


def machine_bytes(machine: Path = _MACHINE) -> int:
    """How much memory the machine has left.

    Raises:
        OSError, KeyError, ValueError: It does not say so.
    """
    lines = dict(line.split(":", 1) for line in machine.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def _groups(root: Path, own: Path) -> list[Path]:
    """The folders of this process's memory group and of the groups above it, in both versions of cgroups."""
    found = [root, root / "memory"]
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):  # the first is version 2
                top = root / controllers
                group = top / path.lstrip("/")
                found += [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return found


def _left_bytes(group: Path) -> int:
    """What is left of a group's limit.

    Raises:
        OSError, KeyError, ValueError: The group has no limit, or is not there.
    """
    is_version_2 = (group / "memory.max").exists()
    names = ("memory.max", "memory.current") if is_version_2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = (int((group / name).read_text()) for name in names)
    parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    total = "" if is_version_2 else "total_"  # with the groups below
    files = int(parts[f"{total}inactive_file"]) + int(parts[f"{total}active_file"])
    return max(limit - used + files, 0)


def is_in_memory(folder: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether the files of a folder are held in memory. False if it is not known."""
    kinds = {}
    with suppress(OSError):
        for line in mounts.read_bytes().splitlines():
            _, point, kind, *_ = line.split()
            kinds[Path(os.fsdecode(_ESCAPED.sub(lambda code: bytes([int(code[1], 8)]), point)))] = kind
        path = folder.resolve()
        return next((kinds[one] in _IN_MEMORY for one in (path, *path.parents) if one in kinds), False)
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
