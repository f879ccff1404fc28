"""A weights volume that is full, that fails, or that is not the one that it was when the writer started."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import StoreError
from .version import Version

_CHECK = (
    "check that the weights volume is mounted and works, then run the same command again. It resumes from the last "
    "checkpoint."
)


def full(root: Path, version: Version, got: str, needs_bytes: int, fix: str) -> StoreError:
    """Return the error of a volume that has no space for a version."""
    return StoreError(
        f"cannot publish version {version} into {root}: got {got}, expected {needs_bytes / 1e6:.1f} MB. Existing "
        f"versions are unchanged. Fix: {fix}."
    )


def failed(root: Path, version: Version, error: OSError, needs_bytes: int, fix: str) -> StoreError:
    """Return the error of a volume that failed while a version was written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return full(root, version, str(error), needs_bytes, fix)
    return StoreError(f"cannot publish version {version} into {root}: {error}. Fix: {_CHECK}")


@contextmanager
def deleting(root: Path) -> Iterator[None]:
    """Name the error of a volume that fails while old versions are deleted in the `with` block.

    Raises:
        StoreError: It has failed.
    """
    try:
        yield
    except PermissionError:  # has a fix of its own
        raise
    except OSError as error:
        raise StoreError(f"old versions cannot be deleted from {root}: {error}. Fix: {_CHECK}") from error


def vanished(root: Path, version: Version) -> StoreError:
    """Return the error of a version that is gone before the generators have loaded it."""
    return StoreError(
        f"version {version} is not in {root} any more, so no generator can load it. The weights volume was emptied or "
        "mounted again. Fix: run the same command again. It resumes from the last checkpoint."
    )


def check_lock(locked: IO[str] | None, file: Path) -> None:
    """Check that a writer still holds the lock that other writers look at.

    Args:
        locked: The file that it has locked. None: it has no lock, so nothing is checked.
        file: The path of the lock.

    Raises:
        StoreError: Another file is there now, or none.
    """
    if locked is None:
        return
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(locked.fileno()), file.stat()):
            return
    raise StoreError(
        f"{file} is not the file that this trainer has locked. The weights volume was emptied or mounted again "
        "meanwhile, so another trainer may write to it now. Fix: run the same command again. It resumes from the last "
        "checkpoint."
    )
