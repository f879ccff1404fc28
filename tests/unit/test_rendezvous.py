"""The rendezvous of trainer processes listens on the address that other nodes need, and on no other."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from support.ports import free_port
from tandem_trainer import devices
from tandem_trainer.rendezvous import BoundRendezvous, own_address


def _listening() -> set[tuple[str, int]]:
    return {(c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"}


def test_two_nodes_meet_where_only_their_address_listens() -> None:
    before, port = _listening(), free_port()
    nodes = [BoundRendezvous("127.0.0.1", port, rank, world_size=2, run_id="run", timeout=30) for rank in (0, 1)]
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(BoundRendezvous.next_rendezvous, nodes)
    first.store.set("a", "b")
    assert second.store.get("a") == b"b"
    assert _listening() - before == {("127.0.0.1", port)}


@pytest.mark.parametrize(
    ("host", "address", "ours"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("this-machine", "127.0.1.1", None),  # as Debian has it
        ("a-load-balancer", "192.0.2.1", None),  # reserved for documentation: no machine has it
        ("not-known-yet", None, None),
    ],
)
def test_all_addresses_listen_only_if_the_right_one_is_not_clear(
    monkeypatch: pytest.MonkeyPatch, host: str, address: str | None, ours: str | None
) -> None:
    def look_up(*_: object, **__: object) -> object:
        if address is None:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr("tandem_trainer.rendezvous.socket.getaddrinfo", look_up)
    assert own_address(host) == ours


@pytest.mark.parametrize(
    ("env", "interface"),
    [
        ({}, None),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "lo"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, None),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "eth1"}, "eth1"),
    ],
)
def test_ranks_of_one_machine_talk_over_its_loopback_interface(env: dict[str, str], interface: str | None) -> None:
    devices.stay_on_loopback(env)
    assert env.get("GLOO_SOCKET_IFNAME") == interface
