"""Volumes that are full or too small: how long to wait for space, and how to get more."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from tandem_protocol.folders import require_writable

log = logging.getLogger(__name__)

DISK_TIMEOUT_S = 3600.0
"""How long a run with a checkpoint waits until a full disk has space, in seconds."""
DISK_PAUSE_S = 10.0
VOLUME = "TANDEM_WEIGHTS_VOLUME"
"""Environment variable: the name of Compose's weights volume, whose size is fixed when it is created."""
SIZE = "TANDEM_WEIGHTS_SIZE"
"""Environment variable: the size that the volume should have, as a tmpfs takes it, such as `1g`."""
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_TOLERANCE = 0.01
"""A tmpfs has whole pages."""


def free_bytes(folder: Path) -> int:
    """Free space of the volume."""
    return shutil.disk_usage(folder).free


def in_words(size_bytes: int) -> str:
    """A size such as `1.25 GB` or `3.2 MB`."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def wait_until_writable(folder: Path, key: str, *, resumes: bool) -> None:
    """Check that the folder can be written to. If it is only full now, a run with a checkpoint waits.

    Args:
        key: the folder's configuration key, for the message.
        resumes: the run has a checkpoint.

    Raises:
        ConfigError: this user may not write to it.
        OSError: it is full, and was so until DISK_TIMEOUT_S if the run has a checkpoint.
    """
    deadline = time.monotonic() + DISK_TIMEOUT_S
    while True:
        try:
            require_writable(folder, key)
            return
        except OSError as error:
            if not resumes or time.monotonic() > deadline:
                raise
            log.warning("%s The run waits until there is space, for at most an hour.", error)
            time.sleep(DISK_PAUSE_S)


def how_to_enlarge(version_bytes: int, keep: int, env: Mapping[str, str] = os.environ) -> str:
    """Return the fix for a weights volume that is too small.

    Args:
        version_bytes: size of one version.
        keep: `trainer.publish.keep`. The volume also holds the version that is being written, and one that a generator
            has not left yet.
    """
    size = f"{math.ceil((keep + 2) * version_bytes / (1 << 20))}m"
    if not env.get(VOLUME):
        return f"enlarge the weights volume to {size}, or lower trainer.publish.keep"
    return f"enlarge the weights volume: {_commands(env[VOLUME], size)}. Or lower trainer.publish.keep"


def check_size(weights_dir: Path, env: Mapping[str, str] = os.environ) -> None:
    """Warn if the weights volume has another size than the user asked for."""
    asked = _bytes(env.get(SIZE, ""))
    if not env.get(VOLUME) or asked is None:
        return
    found = shutil.disk_usage(weights_dir).total
    if abs(found - asked) > _TOLERANCE * asked:
        log.warning(
            "%s is %s, but the weights volume has %.0f MiB: an existing volume keeps its size. Fix: %s",
            SIZE,
            env[SIZE],
            found / (1 << 20),
            _commands(env[VOLUME], env[SIZE]),
        )


def _commands(volume: str, size: str) -> str:
    return f"`docker compose down && docker volume rm {volume}`, and start again with {SIZE}={size}"


def _bytes(text: str) -> int | None:
    found = re.fullmatch(r"(\d+)([kmg]?)", text.lower())
    return int(found[1]) * _UNITS[found[2]] if found else None
