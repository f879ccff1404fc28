"""Which generator replicas there are now: a host name with several addresses stands for a replica at each."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit


class Replicas:
    """The replicas behind the base URLs of `shared.generators`.

    `docker compose --scale generator=2` and a headless Service of Kubernetes give one name the addresses of all
    replicas that run, so that none has to be listed and one that comes back under another address is found.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = tuple(urls)

    async def now(self) -> tuple[str, ...]:
        """Their base URLs, at least one. A name without an address stays as it is: asking it tells what is wrong."""
        found = [await _addresses(url) for url in self._urls]
        return tuple(url for urls in found for url in urls)


async def _addresses(url: str) -> list[str]:
    parts = urlsplit(url)
    port = parts.port or 80
    if parts.scheme == "https":  # a certificate is for the name
        return [url]
    try:
        # IPv4 only, or `localhost` would be two.
        answers = await asyncio.get_running_loop().getaddrinfo(
            parts.hostname, port, type=socket.SOCK_STREAM, family=socket.AF_INET
        )
    except OSError:
        return [url]
    addresses = sorted({str(address[0]) for *_, address in answers})
    return [url] if len(addresses) == 1 else [f"http://{address}:{port}" for address in addresses]
