"""Listening on a port, and who has it already."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from pathlib import Path

from .config import ConfigError

_LISTENS = "0A"
"""The state of a listening socket in the kernel's tables."""
_PROC = Path("/proc")


def listen(host: str, port: int, key: str) -> socket.socket:
    """A socket that listens.

    Args:
        key: of the configuration, for the message.

    Raises:
        ConfigError: the port is in use, or this machine cannot listen there.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(problem(error, host, port, key)) from error


def problem(error: OSError, host: str, port: int, key: str) -> str:
    """Why nothing can listen at `host`:`port`, and what to do."""
    where = f"{key} {port}{f' on {host}' if host else ''} cannot be listened on"
    reason = str(error.strerror).partition(" (while")[0]  # without the address, which is said already
    if error.errno == errno.EADDRINUSE:
        return f"{where}: it is in use{_by(port)}. Fix: end that process, or choose another {key}."
    if error.errno == errno.EACCES:
        return f"{where}: {reason}. Fix: choose a port from 1024 on."
    return f"{where}: {reason}. Fix: use an address of this machine, such as 127.0.0.1 or 0.0.0.0."


def _by(port: int) -> str:
    """` by process 12 (python -m tandem_generator)`; nothing where this user may not see it."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to another user
            if any(_target(link) in sockets for link in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f" by process {process.name} ({command[:100]})"
    return ""


def _target(link: Path) -> str | None:
    try:
        return str(link.readlink())
    except OSError:  # it has been closed meanwhile
        return None


def _listening(port: int) -> set[str]:
    """The inodes of sockets that listen on it."""
    found = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for row in (_PROC / "net" / table).read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = row.split()[:10]
                if state == _LISTENS and int(local.rpartition(":")[2], 16) == port:
                    found.add(inode)
    return found
