"""A network file system with a bandwidth that is known: sshfs between hosts that are network namespaces.

The store and each client are hosts of their own. `tc` limits both directions of the link between them, so bytes take as
long as on a real network of that speed. The clients have separate mounts: a page that one has written is not in the
other's cache. TCP, the file server and the clients are real ones. Only the hosts share their CPUs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

PROGRAMS = ("ip", "tc", "nsenter", "sshfs", "fusermount3")
SFTP_SERVER = Path("/usr/lib/openssh/sftp-server")
PORT = 9000
TIMEOUT_S = 20.0
POLL_S = 0.02
OPTIONS = f"directport={PORT},auto_cache"
"""Nothing is encrypted, because that costs more CPU than the rest. A file is read again if it has changed, as with NFS
(`auto_cache`)."""
SERVE = """
import socket, subprocess, sys
with socket.create_server(("", int(sys.argv[2]))) as listener:
    print("listens", flush=True)
    while True:
        connection, _ = listener.accept()
        with connection:
            subprocess.Popen([sys.argv[1]], stdin=connection, stdout=connection)
"""


def missing() -> str | None:
    """Say why no such volume can be made here. None if it can."""
    if os.geteuid() != 0:
        return "got an ordinary user, expected root: network namespaces and mounts need it"
    if lacking := [name for name in PROGRAMS if not shutil.which(name)] + [SFTP_SERVER.name] * (
        not SFTP_SERVER.exists()
    ):
        return f"{', '.join(lacking)} not installed. Fix: apt-get install sshfs openssh-sftp-server iproute2"
    return None if Path("/dev/fuse").exists() else "the kernel has no /dev/fuse"


@contextmanager
def mounted(backing: Path, points: Sequence[Path], bytes_per_s: float, *, listed_s: int = 0) -> Iterator[None]:
    """Mount the folder `backing` at each of `points`, each for a client of its own, during the `with` block.

    Args:
        bytes_per_s: Bandwidth of each client's link, in each direction.
        listed_s: How long a client trusts a listing of a folder, in seconds. 0: it sees at once what others write.

    Raises:
        RuntimeError: A mount does not appear in time.
    """
    options = f"{OPTIONS},{f'dcache_timeout={listed_s}' if listed_s else 'dir_cache=no'}"
    with ExitStack() as stack:
        store = stack.enter_context(_namespace(f"tandem-{os.getpid()}-store"))
        server = stack.enter_context(
            _process(store, sys.executable, "-c", SERVE, str(SFTP_SERVER), str(PORT), stdout=subprocess.PIPE)
        )
        assert server.stdout is not None
        assert server.stdout.readline(), "the server ended"
        for index, point in enumerate(points):
            host = stack.enter_context(_namespace(f"tandem-{os.getpid()}-{index}"))
            _link(store, host, index, bytes_per_s)
            point.mkdir(parents=True, exist_ok=True)
            source = f"10.77.{index}.1:{backing}"
            process = stack.enter_context(_process(host, "sshfs", "-f", source, str(point), "-o", options))
            stack.callback(partial(subprocess.run, ["fusermount3", "-u", "-z", point], check=False))
            deadline = time.monotonic() + TIMEOUT_S
            while not point.is_mount():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"sshfs did not mount {source} at {point} within {TIMEOUT_S:g} s")
                time.sleep(POLL_S)
        yield


@contextmanager
def _namespace(name: str) -> Iterator[str]:
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        _run("ip", "netns", "delete", name)  # and with it its end of a link, which removes the other one


@contextmanager
def _process(namespace: str, *command: str, stdout: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process of that host. It has this process's mounts: `ip netns exec` would give it others."""
    with subprocess.Popen(["nsenter", f"--net=/run/netns/{namespace}", *command], stdout=stdout) as process:
        try:
            yield process
        finally:
            process.terminate()


def _link(store: str, host: str, index: int, bytes_per_s: float) -> None:
    """Connect two hosts with 10.77.INDEX.1 for the store and 10.77.INDEX.2 for the client."""
    ends = {store: f"s{index}", host: "c"}
    _run("ip", "link", "add", ends[store], "netns", store, "type", "veth", "peer", "name", ends[host], "netns", host)
    rate = f"{round(8 * bytes_per_s / 1e6)}mbit"
    for number, (namespace, device) in enumerate(ends.items(), start=1):
        _run("ip", "-n", namespace, "address", "add", f"10.77.{index}.{number}/24", "dev", device)
        _run("ip", "-n", namespace, "link", "set", device, "up")
        shaper = ("root", "tbf", "rate", rate, "burst", "1mb", "latency", "100ms")
        _run("tc", "-n", namespace, "qdisc", "add", "dev", device, *shaper)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}")
