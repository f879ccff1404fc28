"""Check the folders in the configuration before a service starts."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from tempfile import TemporaryFile

from .config import ConfigError

TEMPORARY = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
"""Errors that may be gone at the next try."""


def require_writable(folder: Path, key: str) -> None:
    """Create the folder if it is missing, and test that it can be written to.

    Args:
        folder: The folder.
        key: Its configuration key, for the message.

    Raises:
        ConfigError: The folder cannot be created, or this user may not write to it.
        OSError: It cannot be written to now. The disk may be full, for example.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        kind = OSError if error.errno in TEMPORARY else ConfigError
        raise kind(_problem(folder, key, error, "written to")) from error


def require_readable(folder: Path, key: str) -> None:
    """Refuse a folder that exists but cannot be listed. A missing folder passes, since it may be created later.

    Args:
        folder: The folder.
        key: Its configuration key, for the message.

    Raises:
        ConfigError: The path is not a folder, or this user may not read it.
    """
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(_problem(folder, key, error, "read")) from error


def permission_problem(error: PermissionError) -> str:
    """Describe a file or folder that this user may not use, with the fix."""
    return f"{error.filename}: {error.strerror}, as user {os.geteuid()}. Fix: {_own('its folder')}."


def _own(folder: str) -> str:
    return (
        f"run `chown -R {os.geteuid()}:{os.getegid()}` on {folder} (if it is mounted into a container: on the host's "
        "folder or on the volume)"
    )


def _problem(folder: Path, key: str, error: OSError, verb: str) -> str:
    problem = f"{key}: {folder.absolute()} cannot be {verb}: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{problem}, as user {os.geteuid()}. Fix: {_own('it')}, or choose another {key}."
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{problem}: something on this path is a file. Fix: choose another {key}."
    if error.errno == errno.EROFS:
        return f"{problem}. Fix: mount it so that it can be written to, or choose another {key}."
    return f"{problem}. Fix: free some space there, or choose another {key}."


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
