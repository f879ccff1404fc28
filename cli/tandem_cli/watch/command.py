"""Run the web server of `tandem watch` until Ctrl-C."""

from __future__ import annotations

import secrets
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn

from tandem_protocol.config import ConfigError

from .runs import find_runs
from .server import make_app

SHUTDOWN_S = 5


def watch(folders: Sequence[Path], *, host: str, port: int) -> int:
    """Serve the page of some runs. Returns the exit code after Ctrl-C.

    Raises:
        ConfigError: a folder is not the folder of a run, or the address cannot be used.
    """
    runs = find_runs(folders)
    listener = listen(host, port)
    token = secrets.token_urlsafe(24)
    for run in runs:
        if not run.state()["exists"]:
            print(f"note: {run.name} has not started yet; the page shows it as soon as it does", file=sys.stderr)
    print(f"Open {address(listener)}/?token={token}\nCtrl-C ends the page. The run is not affected.", flush=True)
    config = uvicorn.Config(
        make_app(runs, token, host),
        log_level="warning",
        log_config=None,  # through the root logger, in our format
        access_log=False,  # its lines would hold the token
        timeout_graceful_shutdown=SHUTDOWN_S,
        server_header=False,
        lifespan="off",
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises it again at its end
        uvicorn.Server(config).run(sockets=[listener])
        return 0
    return 130


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: the port is in use, or the host is not an address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"got --host {host} --port {port}, which cannot be used: {error}. Fix: choose another port, such as "
            "--port 0 for a free one, or an address of this machine."
        ) from error


def address(listener: socket.socket) -> str:
    """Return the address for a browser on this machine."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - only compared: the user has chosen it
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
