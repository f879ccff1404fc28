"""Ports that only one test uses at a time, also when several processes run tests on the same machine."""

from __future__ import annotations

import fcntl
import random
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_PORTS: Sequence[int] = range(15_000, 32_000)
"""Below Linux's range for ports of outgoing connections and for port 0, so that neither takes a port that was given."""
_LOCKS = Path(tempfile.gettempdir()) / "tandem-test-ports"
_reserved: list[IO[bytes]] = []
"""Locked files. The kernel releases their locks when this process ends."""


def free_port() -> int:
    """Return a port on which nothing listens, and reserve it among all tests of this machine until this process ends.

    A port that is only looked up can be taken by another test before the server of this one listens on it.
    """
    _LOCKS.mkdir(exist_ok=True)
    for port in random.sample(_PORTS, len(_PORTS)):
        lock = (_LOCKS / str(port)).open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:  # another test has the port, or a program listens on it
            lock.close()
            continue
        _reserved.append(lock)
        return port
    raise RuntimeError(f"none of {len(_PORTS)} ports is free")


def is_free(port: int) -> bool:
    """Whether a process can listen on the port."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
