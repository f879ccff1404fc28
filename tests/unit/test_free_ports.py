"""The ports that tests get: nobody listens there, and no other test of this machine gets the same."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from support import ports


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The only three ports that can be given."""
    some = [ports.free_port() for _ in range(3)]
    monkeypatch.setattr(ports, "_PORTS", some)
    monkeypatch.setattr(ports, "_LOCKS", tmp_path)
    monkeypatch.setattr(ports, "_reserved", [])
    return some


def test_no_port_is_given_twice(few: list[int]) -> None:
    assert {ports.free_port() for _ in few} == {*few}
    with pytest.raises(RuntimeError, match="none of 3 ports is free"):
        ports.free_port()


def test_a_port_where_somebody_listens_is_not_given(few: list[int]) -> None:
    with socket.create_server(("0.0.0.0", few[1])):
        assert {ports.free_port() for _ in range(2)} == {few[0], few[2]}
