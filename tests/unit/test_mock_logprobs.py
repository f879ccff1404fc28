"""TRL asks a server for up to 100 logprobs per token. The mock accepts them, if the vocabulary has as many tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from support.models import make_tiny_model
from tandem_generator.engines.mock import MockEngine
from tandem_generator.server import build_app
from tandem_generator.weight_switcher import WeightSwitcher
from tandem_protocol.config.generator import GeneratorConfig, MockConfig
from tandem_protocol.store import WeightStore


@pytest.fixture
async def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    """A mock generator whose vocabulary has 200 tokens."""
    monkeypatch.delenv("TANDEM_TOKEN", raising=False)
    monkeypatch.delenv("TANDEM_TOKEN_FILE", raising=False)
    model = str(make_tiny_model(tmp_path / "model", vocab=200))
    engine = MockEngine(model, MockConfig(), None)
    switcher = WeightSwitcher(engine, WeightStore(tmp_path / "weights"), GeneratorConfig())
    await switcher.start()
    transport = httpx.ASGITransport(build_app(switcher, model))
    async with httpx.AsyncClient(transport=transport, base_url="http://generator") as client:
        yield client
    await switcher.close()


@pytest.mark.parametrize(("asked", "status"), [(100, 200), (101, 422)])
async def test_a_completion_may_ask_for_100_logprobs(client: httpx.AsyncClient, asked: int, status: int) -> None:
    response = await client.post("/v1/completions", json={"prompt": [5, 9], "logprobs": asked, "max_tokens": 3})
    assert response.status_code == status, response.text


@pytest.mark.parametrize(("asked", "status"), [(100, 200), (101, 422)])
async def test_a_conversation_may_ask_for_100_logprobs(client: httpx.AsyncClient, asked: int, status: int) -> None:
    body = {"messages": [{"role": "user", "content": "1+1"}], "logprobs": True, "top_logprobs": asked, "max_tokens": 3}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
