"""A file lock for folders that only one process may write. The kernel releases it when the process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Held(Exception):
    """Another process holds the lock. The message is the name that it gave itself."""


@contextmanager
def exclusive(file: Path, holder: str) -> Iterator[None]:
    """Hold a lock during the `with` block.

    Args:
        file: The lock file. It is created if it is missing.
        holder: Name of this process. It is written into the file, for the message that other processes get.

    Raises:
        Held: Another process holds the lock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            opened.seek(0)
            raise Held(opened.read().strip() or "another process") from error
        with suppress(OSError):  # on a full disk the lock has no name, but it is held
            opened.truncate(0)
            os.write(opened.fileno(), f"{holder}\n".encode())
        yield
