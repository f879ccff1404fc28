"""Run the web server of `tandem watch` until Ctrl-C."""

from __future__ import annotations

import secrets
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn

from tandem_protocol.config import ConfigError, read_token

from .runs import AllRuns, find_runs
from .server import make_app

SHUTDOWN_S = 5
TOKEN_ENV = "TANDEM_WATCH_TOKEN"


def watch(folders: Sequence[Path], *, parent: Path | None, host: str, port: int, url: str | None) -> int:
    """Serve the page of some runs, or of all runs in the folder `parent`. Returns the exit code after Ctrl-C.

    Args:
        folders: the folders of the runs, if `parent` is None.
        parent: the folder of the runs, some of which may begin later.
        host: the address to listen on.
        port: the port to listen on. 0: a free one.
        url: the address for browsers, if it is another one, as behind a proxy.

    Raises:
        ConfigError: a folder is not the folder of a run, the address cannot be used, or the token cannot be read.
    """
    runs = AllRuns(parent) if parent else find_runs(folders)
    if url:
        check_url(url)
    given = read_token(variable=TOKEN_ENV, file_variable=f"{TOKEN_ENV}_FILE")
    token = given or secrets.token_urlsafe(24)
    listener = listen(host, port)
    for run in runs:
        if not run.state()["exists"]:
            print(f"note: {run.name} has not started yet; the page shows it as soon as it does", file=sys.stderr)
    # A token that somebody has chosen stays out of the log.
    where = f"{url or address(listener)}/?token={f'${TOKEN_ENV}' if given else token}"
    print(f"Open {where}\nCtrl-C ends the page. The run is not affected.", flush=True)
    config = uvicorn.Config(
        make_app(runs, token, host, url or ""),
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


def check_url(url: str) -> None:
    """Raise a ConfigError unless `url` is an address of a host, without a path."""
    try:
        parts = urlsplit(url)
        is_fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        is_fine = False
    if not is_fine or url != f"{parts.scheme}://{parts.netloc}":
        raise ConfigError(
            f"got --url {url}, expected http:// or https:// and a host, without a path or a slash at its end. Fix: an "
            "address such as https://watch.example.com; the page must have a host name of its own."
        )


def address(listener: socket.socket) -> str:
    """Return the address for a browser on this machine."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - only compared: the user has chosen it
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
