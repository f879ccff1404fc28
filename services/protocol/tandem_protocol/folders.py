"""Folders of the configuration that a service needs, tried before it starts."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from tempfile import TemporaryFile

from .config import ConfigError


def require_writable(folder: Path, key: str) -> None:
    """Make the folder if it is not there, and write into it.

    Args:
        key: of the configuration, for the message.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ConfigError(_problem(folder, key, error, "written to")) from error


def require_readable(folder: Path, key: str) -> None:
    """Refuse a folder that is there and cannot be listed; one that is not there may still come.

    Raises:
        ConfigError: it is not a folder, or this user may not read it.
    """
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(_problem(folder, key, error, "read")) from error


def _problem(folder: Path, key: str, error: OSError, verb: str) -> str:
    problem = f"{key}: {folder.absolute()} cannot be {verb}: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{problem}, as user {os.geteuid()}. Fix: change its owner or permissions, or choose another {key}."
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{problem}: something on this path is a file. Fix: choose another {key}."
    return f"{problem}. Fix: make room there, or choose another {key}."
