"""Delete old directories and leases of a weight store.

A directory that cannot be deleted at once is hidden, and deleted later.
"""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path

from .repeats import Repeats

RETIRED = ".staging-retired-"
"""The beginning of the name of a directory that is being deleted. Readers ignore it."""
_GONE_S = 3600.0
"""A lease that has not been renewed for this long is removed. A generator that was paused may still renew one that has
only expired."""

repeats = Repeats(logging.getLogger(__name__))


def delete(directory: Path) -> None:
    """Hide a directory from readers, and delete it. What is left of it does not end the run.

    For example, a network file system keeps a file that a process still has open, and so its directory too. The name is
    free for another directory in any case. If the directory is gone, nothing happens.

    Raises:
        OSError: The directory cannot be renamed.
    """
    if not directory.name.startswith(RETIRED):
        # Rename first, so that readers see either all of it or nothing.
        name = f"{RETIRED}{directory.name.removeprefix('.staging-')}.{time.monotonic_ns()}"
        try:
            directory = directory.rename(directory.with_name(name))
        except FileNotFoundError:  # the volume was emptied or mounted again, which the next publication notices
            return
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        message = f"{directory} cannot be deleted completely now. The trainer tries again after the next publication."
        repeats.say(logging.WARNING, "delete", message)


def delete_old_leases(folder: Path) -> None:
    """Delete the leases of generators that are gone, and what they left when they were killed while writing one."""
    for path in (*folder.glob("*.json"), *folder.glob(".*.json.*")):
        with suppress(OSError):  # it stays, which costs a few bytes
            if time.time() - path.stat().st_mtime > _GONE_S:
                path.unlink()
