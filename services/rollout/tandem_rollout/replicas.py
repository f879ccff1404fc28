"""Find the generator replicas that are running: a host name with several addresses stands for several replicas."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit


class Replicas:
    """The replicas behind the base URLs of `shared.generators`.

    With `docker compose --scale generator=2` and with a headless Service of Kubernetes, one name has the addresses of
    all running replicas. Replicas therefore need not be listed, and one that restarts with a new address is found.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = tuple(urls)

    async def now(self) -> tuple[str, ...]:
        """Return the base URLs of the running replicas, at least one.

        A name that has no address is returned unchanged, so that a request to it reports the problem.
        """
        found = [await _addresses(url) for url in self._urls]
        return tuple(url for urls in found for url in urls)


async def _addresses(url: str) -> list[str]:
    parts = urlsplit(url)
    port = parts.port or 80
    if parts.scheme == "https":  # a certificate is valid for the name, not for an address
        return [url]
    try:
        # IPv4 only, because `localhost` would otherwise count as two replicas.
        answers = await asyncio.get_running_loop().getaddrinfo(
            parts.hostname, port, type=socket.SOCK_STREAM, family=socket.AF_INET
        )
    except OSError:
        return [url]
    addresses = sorted({str(address[0]) for *_, address in answers})
    return [url] if len(addresses) == 1 else [f"http://{address}:{port}" for address in addresses]
