"""File locks: of folders that only one process may write, and of a project that services use.

The kernel releases a lock when its process ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PROJECT_LOCK_ENV = "TANDEM_PROJECT_LOCK"
"""Environment variable with the file that running services lock, so that nobody replaces their project."""


class Held(Exception):
    """Another process holds the lock. The message is the name that it gave itself."""


_ATTEMPTS, _PAUSE_S = 3, 0.05
"""`has_owner` holds a lock for an instant, so `exclusive` tries again before it gives up."""


@contextmanager
def exclusive(file: Path, holder: str) -> Iterator[IO[str]]:
    """Hold a lock during the `with` block, and yield the locked file.

    Args:
        file: The lock file. It is created if it is missing.
        holder: Name of this process. It is written into the file, for the message that other processes get.

    Raises:
        Held: Another process holds the lock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as opened:
        try:
            _lock(opened)
        except BlockingIOError as error:
            opened.seek(0)
            raise Held(opened.read().strip() or "another process") from error
        with suppress(OSError):  # on a full disk the lock has no name, but it is held
            opened.truncate(0)
            os.write(opened.fileno(), f"{holder}\n".encode())
        yield opened


def _lock(file: IO[str]) -> None:
    for _ in range(_ATTEMPTS - 1):
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_PAUSE_S)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def has_owner(file: Path) -> bool:
    """Whether a process holds the lock alone. The file is only read, so it may be on a read-only mount.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        with shared(file):
            return False
    except Held:
        return True
    except FileNotFoundError:
        return False


@contextmanager
def shared(file: Path) -> Iterator[None]:
    """Hold a lock during the `with` block that others may share, but that nobody can have exclusively.

    Args:
        file: The lock file. It is only read, so it may be on a read-only mount.

    Raises:
        Held: Another process holds the lock exclusively.
        OSError: The file is missing or cannot be read.
    """
    with file.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Held(opened.read().strip() or "another process") from error
        yield


def is_held(file: Path) -> bool:
    """Whether any process holds the lock, alone or shared."""
    if not file.exists():
        return False
    with file.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def project_in_use(env: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Hold the lock of the project during the `with` block, if the environment names one.

    Raises:
        BlockingIOError: The project is being replaced at this moment.
        OSError: The lock file is missing or cannot be read.
    """
    if not (file := env.get(PROJECT_LOCK_ENV)):
        yield
        return
    try:
        with shared(Path(file)):
            yield
    except Held as error:
        raise BlockingIOError(f"{error} is being prepared. Fix: start this service afterwards.") from error
