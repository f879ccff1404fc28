"""Clients of many episodes at the same time."""

from __future__ import annotations

import ssl
from typing import Any

import pytest

from tandem_rollout.agents import AgentClient

openai: Any = pytest.importorskip("openai")


def test_clients_of_several_episodes_share_one_tls_context(monkeypatch: pytest.MonkeyPatch) -> None:
    client = AgentClient("http://127.0.0.1:1/v1", "key", "policy")
    client.openai()
    monkeypatch.setattr(ssl, "create_default_context", _refuse)
    assert str(client.openai(max_retries=7).base_url) == "http://127.0.0.1:1/v1/"


def test_an_http_client_of_the_agent_is_used() -> None:
    own = openai.DefaultAsyncHttpxClient(verify=False)
    assert AgentClient("http://127.0.0.1:1/v1", "key", "policy").openai(http_client=own)._client is own


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a second context was created")
