"""A lock on a folder that only one process may write. The kernel holds it, so a killed process leaves none behind."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Held(Exception):
    """Another process holds the lock; the message is what it wrote about itself."""


@contextmanager
def exclusive(file: Path, holder: str) -> Iterator[None]:
    """Hold the lock `file` during the block; its content names the holder.

    Raises:
        Held: another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            opened.seek(0)
            raise Held(opened.read().strip() or "another process") from error
        opened.truncate(0)
        opened.write(f"{holder}\n")
        opened.flush()
        yield
