"""Environment servers in the test's process: their apps, reached without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from tandem_rollout.environments import Environments, RemoteEnvironments
from tandem_rollout.environments.routes import build_app
from tandem_rollout.environments.served import Sessions
from tandem_rollout.environments.servers import Servers

TOKEN = "a-token-of-environments"


class Replica:
    """A server and what it holds."""

    def __init__(self, environments: Environments, *, clock: Callable[[], float] = lambda: 0.0, **options: Any) -> None:
        given = {"max_sessions": 100, "idle_timeout_s": 60.0, "timeout_s": 5.0} | options
        self.sessions = Sessions(environments, clock=clock, **given)
        self.app = build_app(environments, self.sessions, TOKEN)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app),
            base_url="http://replica",
            headers={"Authorization": f"Bearer {TOKEN}"},
        )


class Network(httpx.AsyncBaseTransport):
    """Connects to replicas by address: the first is 127.0.0.1, the second 127.0.0.2."""

    def __init__(self, *replicas: Replica) -> None:
        self._transports = {f"127.0.0.{n}": httpx.ASGITransport(one.app) for n, one in enumerate(replicas, start=1)}
        self.urls = [f"http://{address}:8100" for address in self._transports]
        self.dead: set[str] = set()
        """Addresses that refuse connections."""
        self.breaks = 0
        """How many of the next answers are lost."""
        self.requests: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(f"{request.method} {request.url.path}")
        if request.url.host in self.dead:
            raise httpx.ConnectError("connection refused")
        response = await self._transports[request.url.host].handle_async_request(request)
        if self.breaks:
            self.breaks -= 1
            raise httpx.ReadError("connection reset")
        return response


def remote(
    network: Network, *, token: str = TOKEN, owner: str = "rank-0", start_timeout_s: float = 5.0, **options: Any
) -> RemoteEnvironments:
    given = {"timeout_s": 5.0, "open_timeout_s": 5.0} | options
    servers = Servers(network.urls, token, owner=owner, transport=network, **given)
    return RemoteEnvironments(servers, start_timeout_s=start_timeout_s)


async def connected(*replicas: Replica, **options: Any) -> tuple[RemoteEnvironments, Network]:
    network = Network(*replicas)
    environments = remote(network, **options)
    await environments.start()
    return environments, network
