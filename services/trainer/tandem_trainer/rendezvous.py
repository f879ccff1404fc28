"""Where trainer processes meet: torch's static rendezvous, without a port that listens on all addresses."""

from __future__ import annotations

import socket
from contextlib import suppress
from ipaddress import ip_address

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it without saying so
from torch.distributed.elastic.rendezvous import RendezvousInfo
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from tandem_protocol.ports import listen


class BoundRendezvous(StaticTCPRendezvous):
    """Node 0 listens on the address of the rendezvous only. torch's own class listens on all addresses of the node."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other nodes. The first call on node 0 starts the store.

        Raises:
            ConfigError: another process has taken the port since the launcher checked it.
        """
        address = own_address(self.master_addr) if self.rank == 0 else None
        if address and self._store is None:
            listening = listen(address, self.master_port, "the port of the rendezvous")
            self._store = TCPStore(
                address,
                self.master_port,
                self.world_size,
                is_master=True,
                timeout=self.timeout,
                multi_tenant=True,
                master_listen_fd=listening.detach(),
            )
        return super().next_rendezvous()


def own_address(host: str) -> str | None:
    """Return this machine's address that other nodes reach as `host`.

    Returns None if that is not clear, and torch then listens on all addresses: the name is not known yet, its address
    belongs to a load balancer, or it is a loopback address. Debian gives that to the name of the machine itself, while
    other nodes know its real one.
    """
    with suppress(OSError):
        family, _, _, _, (address, *_) = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        if ip_address(address).is_loopback and host not in (address, "localhost"):
            return None
        socket.create_server((address, 0), family=family).close()
        return str(address)
    return None
