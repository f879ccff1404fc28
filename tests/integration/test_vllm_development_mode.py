"""With VLLM_SERVER_DEV_MODE, a generator gives clients of vLLM the same answers as without it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from support.models import make_tiny_model
from tandem_generator.engines.mock import MockEngine
from tandem_generator.options import parse

pytestmark = pytest.mark.vllm


def answers(model: Path, monkeypatch: pytest.MonkeyPatch, development: str) -> dict[str, Any]:
    """Return the answers of vLLM's server with Tandem's plug-in, without an engine."""
    from vllm.entrypoints.launchers.api_server.routers import register_api_routers

    from tandem_generator.plugin import TandemRoutes

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", development)
    settings = parse(["--model", str(model), "--weights-dir", str(model.parent / "weights")]).settings
    monkeypatch.setattr(TandemRoutes, "settings", settings, raising=False)
    monkeypatch.setattr(TandemRoutes, "switcher", None, raising=False)
    app = FastAPI()
    app.state.args = Namespace()
    register_api_routers(Namespace(), app, ("generate",))
    plugin = TandemRoutes()
    plugin.attach_router(app)
    plugin.engine.facts = MockEngine(str(model), settings.generator.mock, None).facts
    client = TestClient(app, raise_server_exceptions=False)  # /is_sleeping asks the engine, which is missing
    found = {path: client.get(path).json() for path in ("/get_world_size", "/get_world_size?include_dp=false")}
    for form in ("json", "text"):
        found[form] = client.get("/server_info", params={"config_format": form}).json()
    found["cache"] = client.post("/reset_prefix_cache").json()
    found["development"] = client.get("/is_sleeping").status_code != 404
    return found


def test_development_mode_changes_no_answer_that_trl_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(tmp_path / "model")
    without, within = (answers(model, monkeypatch, development) for development in ("0", "1"))
    assert (without.pop("development"), within.pop("development")) == (False, True)
    assert within == without
    assert within["/get_world_size"] == {"world_size": 0}
