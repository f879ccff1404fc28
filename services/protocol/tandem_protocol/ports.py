"""Open a port for listening, and find out which process is using it."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from pathlib import Path

from .config import ConfigError

LOOPBACK_ONLY = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Environment variables that keep processes which compute together on one machine off its other interfaces."""
_LISTENS = "0A"
"""State of a listening socket in /proc/net/tcp."""
_PROC = Path("/proc")


def listen(host: str, port: int, key: str) -> socket.socket:
    """Return a socket that listens on `host`:`port`.

    Args:
        host: Address or host name to listen on.
        port: TCP port. 0 takes any free port.
        key: Configuration key of the port, for the message.

    Raises:
        ConfigError: The port is in use, or this machine does not have the address.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(problem(error, host, port, key)) from error


def problem(error: OSError, host: str, port: int, key: str) -> str:
    """Return a message that says why nothing can listen on `host`:`port`, and how to fix it.

    Args:
        error: What the operating system reported.
        host: Address or host name. Empty for all addresses.
        port: TCP port.
        key: Configuration key of the port.
    """
    where = f"{key} {port}{f' on {host}' if host else ''} cannot be listened on"
    reason = str(error.strerror).partition(" (while")[0]  # cut off the address, which `where` contains
    if error.errno == errno.EADDRINUSE:
        return f"{where}: it is in use{_by(port)}. Fix: stop that process, or choose another {key}."
    if error.errno == errno.EACCES:
        return f"{where}: {reason}. Fix: choose a port of 1024 or above."
    return f"{where}: {reason}. Fix: use an address of this machine, such as 127.0.0.1 or 0.0.0.0."


def _by(port: int) -> str:
    """Return ` by process 12 (python -m tandem_generator)`. Empty if this user may not see the process."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            if any(_target(link) in sockets for link in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f" by process {process.name} ({command[:100]})"
    return ""


def _target(link: Path) -> str | None:
    try:
        return str(link.readlink())
    except OSError:  # closed in the meantime
        return None


def _listening(port: int) -> set[str]:
    """Return the inodes of the sockets that listen on `port`."""
    found = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for row in (_PROC / "net" / table).read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = row.split()[:10]
                if state == _LISTENS and int(local.rpartition(":")[2], 16) == port:
                    found.add(inode)
    return found
