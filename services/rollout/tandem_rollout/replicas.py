"""Find the generator replicas that are running: a host name with several addresses stands for several replicas."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from tandem_protocol.logs import event

log = logging.getLogger(__name__)


class Replicas:
    """The replicas behind the base URLs of `shared.generators`.

    With `docker compose --scale generator=2` and with a headless Service of Kubernetes, one name has the addresses of
    all running replicas. Replicas therefore need not be listed, and one that restarts with a new address is found.
    """

    def __init__(self, urls: Sequence[str], *, reports: bool = True) -> None:
        """
        Args:
            reports: whether to log that the number of replicas has changed.
        """
        self._urls = tuple(urls)
        self._reports = reports
        self._found: tuple[str, ...] = ()
        self._looked_s = -1.0
        """When the last look-up began."""
        self._looking = asyncio.Lock()

    async def now(self, *, max_age_s: float = 0.0) -> tuple[str, ...]:
        """Return the base URLs of the running replicas, at least one.

        A name that has no address is returned unchanged, so that a request to it reports the problem.

        Args:
            max_age_s: how old the answer may be. Callers that ask at the same time share a look-up.
        """
        clock = asyncio.get_running_loop().time
        oldest_s = clock() - max_age_s
        if not self._found or self._looked_s < oldest_s:
            async with self._looking:
                if not self._found or self._looked_s < oldest_s:
                    began_s = clock()
                    found = [await _addresses(url) for url in self._urls]
                    before, self._found = self._found, tuple(url for urls in found for url in urls)
                    self._looked_s = began_s
                    self._report(len(before), len(self._found))
        return self._found

    def _report(self, before: int, now: int) -> None:
        if before and before != now and self._reports:
            level = logging.WARNING if now < before else logging.INFO
            details = event("replicas_changed", before=before, now=now)
            log.log(level, "the number of generators is %d now; it was %d", now, before, extra=details)


async def _addresses(url: str) -> list[str]:
    parts = urlsplit(url)
    port = parts.port or 80
    if parts.scheme == "https":  # a certificate is valid for the name, not for an address
        return [url]
    if parts.hostname is None or _is_address(parts.hostname):
        return [url]
    # One family only, because `localhost` would otherwise count as two replicas.
    addresses = await _resolved(parts.hostname, port, socket.AF_INET)
    addresses = addresses or [f"[{address}]" for address in await _resolved(parts.hostname, port, socket.AF_INET6)]
    return [url] if len(addresses) <= 1 else [f"http://{address}:{port}" for address in addresses]


async def _resolved(host: str, port: int, family: socket.AddressFamily) -> list[str]:
    """Return the addresses of a name in one family. There may be none."""
    try:
        answers = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
    except OSError:
        return []
    return sorted({str(address[0]) for *_, address in answers})


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
